"""Qwen3.5: three layers with the gated delta rule to one with gated attention."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import hybrid, standard

PROJECTIONS = (("in_proj_qkv", "qkv"), ("in_proj_z", "z"), ("in_proj_b", "b"), ("in_proj_a", "a"))

# Files of the multimodal model serve as well: transformers leaves the other parts out.
OTHER_FILES: dict[str, Any] = {
    "module_prefix": "model.",
    "layouts": (("model.language_model.", "lm_head"),),
    "outside": ("mtp.", "model.visual."),
}


def read(config: Any) -> Architecture:
    return decoder(config, [standard.mlp(config)] * config.num_hidden_layers, PROJECTIONS, **OTHER_FILES)


def decoder(
    config: Any, mlps: list[Any], projections: tuple[tuple[str, str], ...], grouped: bool = False, **more: Any
) -> Architecture:
    """Returns a decoder with layers of the gated delta rule and of gated attention.

    Args:
        mlps: the MLP or mixture of experts of each layer.
        projections, grouped: of the gated delta rule.
        more: fields of :class:`Architecture`.
    """
    norm, bias = Norm(config.rms_norm_eps, offset=1.0), bool(config.attention_bias)
    mixers = {
        "full_attention": (
            "self_attn",
            standard.attention(config, gated=True, qk_norm=norm, qkv_bias=bias, o_bias=bias),
        ),
        "linear_attention": (
            "linear_attn",
            standard.gated_delta(config, projections, grouped=grouped, norm_eps=config.rms_norm_eps),
        ),
    }
    layers = hybrid.layers(config, mixers, mlps, norm)
    return standard.architecture(config, layers, norm, **({"outside": ("mtp.",)} | more))
