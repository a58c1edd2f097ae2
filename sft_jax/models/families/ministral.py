"""Ministral: Mistral with local and global layers."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    return standard.decoder(config, standard.attention(config), standard.mlp(config))
