"""Apertus: a plain MLP with the activation xIELU, query and key norms."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard

ORDER = standard.Order(before_mixer="attention_layernorm", before_mlp="feedforward_layernorm")


def read(config: Any) -> Architecture:
    bias = bool(config.attention_bias)
    attention = standard.attention(config, qk_norm=Norm(config.rms_norm_eps), qkv_bias=bias, o_bias=bias)
    return standard.decoder(config, attention, standard.mlp(config, gated=False), order=ORDER)
