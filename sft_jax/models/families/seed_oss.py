"""Seed-OSS."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    attention = standard.attention(config, qkv_bias=bool(config.attention_bias), o_bias=bool(config.attention_out_bias))
    return standard.decoder(config, attention, standard.mlp(config, bool(config.mlp_bias)))
