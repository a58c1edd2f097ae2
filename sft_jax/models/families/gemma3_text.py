"""Gemma 3: norms before and after attention and MLP, two rotary embeddings, five local layers per global layer."""

from __future__ import annotations

from typing import Any

from sft_jax.models.architecture import Architecture, Layer, Norm, Residual
from sft_jax.models.families import standard

SANDWICH = Residual(
    after_mixer="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def read(config: Any) -> Architecture:
    norm, mlp, layers = Norm(config.rms_norm_eps, offset=1.0), standard.mlp(config), []
    for kind, window in zip(config.layer_types, standard.sliding_windows(config), strict=True):
        attention = standard.attention(
            config,
            rope=standard.rope(config.rope_parameters[kind], config.max_position_embeddings),
            scale=config.query_pre_attn_scalar**-0.5,
            window=window,
            softcap=config.attn_logit_softcapping,
            qk_norm=norm,
            qkv_bias=bool(config.attention_bias),
            o_bias=bool(config.attention_bias),
        )
        layers.append(Layer(attention, mlp, norm, SANDWICH))
    return standard.architecture(
        config,
        tuple(layers),
        norm,
        embedding_scale=config.hidden_size**0.5,
        logits_softcap=config.final_logit_softcapping,
    )
