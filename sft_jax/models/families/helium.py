"""Helium: interleaved rotary embedding."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    bias = bool(config.attention_bias)
    rope = standard.rope(config.rope_parameters, config.max_position_embeddings, config.head_dim, interleaved=True)
    attention = standard.attention(config, rope=rope, qkv_bias=bias)
    return standard.decoder(config, attention, standard.mlp(config, bool(config.mlp_bias)))
