"""Qwen3: query and key norms."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    bias, norm = bool(config.attention_bias), Norm(config.rms_norm_eps)
    attention = standard.attention(config, qk_norm=norm, qkv_bias=bias, o_bias=bias)
    return standard.decoder(config, attention, standard.mlp(config))
