"""Qwen3.5: three layers with the gated delta rule to one with gated attention."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard

PROJECTIONS = (("in_proj_qkv", "qkv"), ("in_proj_z", "z"), ("in_proj_b", "b"), ("in_proj_a", "a"))
LINEAR = standard.Order(mixer="linear_attn")


def read(config: Any) -> Architecture:
    norm, mlp, bias = Norm(config.rms_norm_eps, offset=1.0), standard.mlp(config), bool(config.attention_bias)
    attention = standard.attention(config, gated=True, qk_norm=norm, qkv_bias=bias, o_bias=bias)
    delta = standard.gated_delta(config, PROJECTIONS, norm_eps=config.rms_norm_eps)
    full, linear = standard.PRE_NORM.layer(attention, mlp, norm), LINEAR.layer(delta, mlp, norm)
    layers = tuple(full if kind == "full_attention" else linear for kind in config.layer_types)
    return standard.architecture(
        config,
        layers,
        norm,
        # Files of the multimodal model serve as well: transformers leaves the other parts out.
        module_prefix="model.",
        layouts=(("model.language_model.", "lm_head"),),
        outside=("mtp.", "model.visual."),
    )
