"""Qwen2 and Qwen2.5: biases in the query, key and value projections."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    return standard.decoder(config, standard.attention(config, qkv_bias=True), standard.mlp(config))
