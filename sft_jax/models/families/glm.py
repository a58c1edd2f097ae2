"""GLM-4 9B: a partial rotation of neighboring channels, a fused MLP."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    return standard.decoder(config, attention(config), standard.mlp(config, fused="gate_up_proj"))


def attention(config: Any) -> standard.SelfAttentionSpec:
    """Returns the attention of GLM-4."""
    return standard.attention(config, interleaved=True, qkv_bias=bool(config.attention_bias))
