"""Hunyuan dense: norms of queries and keys after the rotation."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    bias, norm = bool(config.attention_bias), Norm(config.rms_norm_eps)
    attention = standard.attention(config, qk_norm=norm, qk_norm_last=True, qkv_bias=bias, o_bias=bias)
    tensors = (("self_attn.q_norm", "self_attn.query_layernorm"), ("self_attn.k_norm", "self_attn.key_layernorm"))
    return standard.decoder(config, attention, standard.mlp(config), norm, tensors=tensors)
