"""OLMo 3: OLMo 2 with local layers, which may have a rotary embedding of their own."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm, Rope
from sft_jax.models.families import standard
from sft_jax.models.families.olmo2 import POST_NORM


def read(config: Any) -> Architecture:
    bias, norm = bool(config.attention_bias), Norm(config.rms_norm_eps)
    attention = standard.attention(config, rope=None, qk_norm=norm, qk_norm_heads=True, qkv_bias=bias, o_bias=bias)

    def rope_of(layer: int, window: int | None) -> Rope:
        parameters = config.rope_parameters[config.layer_types[layer]]
        return standard.rope(parameters, config.max_position_embeddings, attention.head_dim)

    return standard.decoder(config, attention, standard.mlp(config), norm, POST_NORM, rope_of)
