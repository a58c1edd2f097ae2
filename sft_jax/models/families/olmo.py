"""OLMo: layer norms without parameters."""

from typing import Any

from sft_jax.errors import UserError
from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    if config.clip_qkv is not None:
        raise UserError(f"clip_qkv {config.clip_qkv} is not supported")
    bias = bool(config.attention_bias)
    attention = standard.attention(config, qkv_bias=bias, o_bias=bias)
    norm = Norm(1e-5, centered=True, has_weight=False)
    return standard.decoder(config, attention, standard.mlp(config), norm)
