"""SmolLM3: some layers without rotary embedding."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    bias = bool(config.attention_bias)
    attention = standard.attention(config, qkv_bias=bias, o_bias=bias)
    rotates = config.no_rope_layers  # 1 where a layer does
    return standard.decoder(
        config,
        attention,
        standard.mlp(config, bool(config.mlp_bias)),
        rope_of=lambda layer, window: attention.rope if rotates[layer] else None,
    )
