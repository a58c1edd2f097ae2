"""GPT-2: learned positions, fused projections, linear layers stored as ``[in, out]``."""

from typing import Any

from sft_jax.errors import UserError
from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard

TENSORS = (("embed_tokens", "wte"), ("embed_positions", "wpe"), ("layers", "h"), ("norm", "ln_f"))


def read(config: Any) -> Architecture:
    for key, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if getattr(config, key) is not usual:
            raise UserError(f"{key}: {getattr(config, key)} is not supported")
    attention = standard.attention(config, rope=None, fused="c_attn", qkv_bias=True, o_bias=True, o_name="c_proj")
    size = config.n_inner or 4 * config.n_embd
    mlp = standard.mlp(config, bias=True, gated=False, names=("c_fc", "c_proj"), intermediate_size=size)
    return standard.decoder(
        config,
        attention,
        mlp,
        Norm(config.layer_norm_epsilon, centered=True, has_bias=True),
        standard.Order(before_mixer="ln_1", before_mlp="ln_2", mixer="attn"),
        learned_positions=True,
        conv1d=True,
        prefix="transformer.",
        layouts=(("", "lm_head"),),
        tensors=TENSORS,
    )
