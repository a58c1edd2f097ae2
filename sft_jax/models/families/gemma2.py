"""Gemma 2: norms before and after mixer and MLP, soft caps, every other layer local."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard
from sft_jax.models.families.gemma3_text import SANDWICH


def read(config: Any) -> Architecture:
    norm, bias = Norm(config.rms_norm_eps, offset=1.0), bool(config.attention_bias)
    attention = standard.attention(
        config,
        scale=config.query_pre_attn_scalar**-0.5,
        softcap=config.attn_logit_softcapping,
        qkv_bias=bias,
        o_bias=bias,
    )
    return standard.decoder(
        config,
        attention,
        standard.mlp(config),
        norm,
        SANDWICH,
        embedding_scale=config.hidden_size**0.5,
        logits_softcap=config.final_logit_softcapping,
    )
