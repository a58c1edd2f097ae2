"""Helium: interleaved rotary embedding."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    bias = bool(config.attention_bias)
    attention = standard.attention(config, interleaved=True, qkv_bias=bias)
    return standard.decoder(config, attention, standard.mlp(config, bool(config.mlp_bias)))
