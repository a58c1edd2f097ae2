"""Gemma 3: norms before and after mixer and MLP, two rotary embeddings, five local layers to a global one."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm, Rope
from sft_jax.models.families import standard

SANDWICH = standard.Order(
    after_mixer="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def read(config: Any) -> Architecture:
    norm, mlp, bias = Norm(config.rms_norm_eps, offset=1.0), standard.mlp(config), bool(config.attention_bias)
    attention = standard.attention(
        config,
        rope=None,
        scale=config.query_pre_attn_scalar**-0.5,
        softcap=config.attn_logit_softcapping,
        qk_norm=norm,
        qkv_bias=bias,
        o_bias=bias,
    )

    def rope_of(layer: int, window: int | None) -> Rope:
        parameters = config.rope_parameters[config.layer_types[layer]]
        return standard.rope(parameters, config.max_position_embeddings, attention.head_dim)

    return standard.decoder(
        config,
        attention,
        mlp,
        norm,
        SANDWICH,
        rope_of,
        embedding_scale=config.hidden_size**0.5,
        logits_softcap=config.final_logit_softcapping,
    )
