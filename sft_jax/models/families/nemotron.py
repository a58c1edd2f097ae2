"""Nemotron 4 and Minitron: layer norms around one, partly rotated heads, a plain MLP with squared ReLU."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    bias = bool(config.attention_bias)
    attention = standard.attention(config, qkv_bias=bias, o_bias=bias)
    norm = Norm(config.norm_eps, offset=1.0, centered=True, has_bias=True)
    return standard.decoder(config, attention, standard.mlp(config, bool(config.mlp_bias), gated=False), norm)
