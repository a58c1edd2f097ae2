"""nanochat: norms without weights, also of embeddings; heads that are rotated backwards, then norms; squared ReLU."""

from dataclasses import replace
from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    bias, norm = bool(config.attention_bias), Norm(config.rms_norm_eps, has_weight=False)
    attention = standard.attention(config, qk_norm=norm, qk_norm_last=True, qkv_bias=bias, o_bias=bias)
    assert attention.rope is not None
    return standard.decoder(
        config,
        replace(attention, rope=replace(attention.rope, backwards=True)),
        standard.mlp(config, gated=False, names=("fc1", "fc2")),
        norm,
        embedding_norm=norm,
        logits_softcap=config.final_logit_softcapping,
    )
