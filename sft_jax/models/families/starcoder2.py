"""StarCoder2: layer norms, a plain MLP, biases."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    bias = bool(config.use_bias)
    attention = standard.attention(config, qkv_bias=bias, o_bias=bias)
    mlp = standard.mlp(config, bias, gated=False, names=("c_fc", "c_proj"))
    return standard.decoder(config, attention, mlp, Norm(config.norm_epsilon, centered=True, has_bias=True))
