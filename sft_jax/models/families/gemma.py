"""Gemma: scaled embeddings, norms around one."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    bias = bool(config.attention_bias)
    attention = standard.attention(config, qkv_bias=bias, o_bias=bias)
    norm = Norm(config.rms_norm_eps, offset=1.0)
    return standard.decoder(config, attention, standard.mlp(config), norm, embedding_scale=config.hidden_size**0.5)
