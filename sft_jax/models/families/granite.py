"""Granite 3: scaled embeddings, scores, residuals and logits."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    bias = bool(config.attention_bias)
    attention = standard.attention(config, scale=config.attention_multiplier, qkv_bias=bias, o_bias=bias)
    return standard.decoder(
        config,
        attention,
        standard.mlp(config, bool(config.mlp_bias)),
        order=standard.Order(scale=config.residual_multiplier),
        embedding_scale=config.embedding_multiplier,
        logits_scale=1.0 / config.logits_scaling,
    )
