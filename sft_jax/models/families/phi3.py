"""Phi-3, Phi-3.5 and Phi-4: fused projections, and ``longrope`` for long contexts."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    attention = standard.attention(config, fused="qkv_proj")
    return standard.decoder(config, attention, standard.mlp(config, fused="gate_up_proj"))
