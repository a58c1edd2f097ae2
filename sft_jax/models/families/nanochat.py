"""nanochat: norms without weights, also of embeddings; heads that rotate backwards, then norms; squared ReLU."""

from dataclasses import replace
from typing import Any

from sft_jax.errors import UserError
from sft_jax.models.architecture import Architecture, Norm, Rope
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    bias, norm = bool(config.attention_bias), Norm(config.rms_norm_eps, has_weight=False)
    attention = standard.attention(config, qk_norm=norm, qk_norm_last=True, qkv_bias=bias, o_bias=bias)
    return standard.decoder(
        config,
        replace(attention, rope=_backwards(attention.rope)),
        standard.mlp(config, gated=False, names=("fc1", "fc2")),
        norm,
        embedding_norm=norm,
        logits_softcap=config.final_logit_softcapping,
    )


def _backwards(rope: Rope | None) -> Rope:
    """Returns the rotation by the negative angles.

    Raises:
        UserError: its ``rope_type`` is not supported.
    """
    assert rope is not None
    if rope.kind not in ("default", "linear"):
        raise UserError(f"rope_type {rope.kind!r} is not supported in nanochat; supported are default, linear, dynamic")
    return replace(rope, kind="linear", factor=-rope.factor)
