"""OLMo hybrid: layers with the gated delta rule, pre-norm, and layers of OLMo 2, often without a rotary embedding."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sft_jax.models.architecture import Architecture, Branch, Layer, Norm
from sft_jax.models.families import standard
from sft_jax.models.families.olmo2 import POST_NORM
from sft_jax.models.recurrent.gated_delta import GatedDeltaSpec

PROJECTIONS = (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("g_proj", "z"), ("b_proj", "b"), ("a_proj", "a"))
LINEAR = standard.Order("attention_layer_norm", before_mlp="feedforward_layer_norm", mixer="linear_attn")
PUBLISHED_NORM, SAVED_NORM = "post_attention_layernorm", "feedforward_layer_norm"


def read(config: Any) -> Architecture:
    norm, mlp, bias = Norm(config.rms_norm_eps), standard.mlp(config), bool(config.attention_bias)
    more: dict[str, Any] = {"qk_norm": norm, "qk_norm_heads": True, "qkv_bias": bias, "o_bias": bias}
    if (config.rope_parameters or {}).get("rope_theta") is None:
        more["rope"] = None
    delta = standard.gated_delta(
        config,
        PROJECTIONS,
        norm="o_norm",
        norm_eps=1e-5,  # fixed in transformers
        output="o_proj",
        max_beta=2.0 if config.linear_allow_neg_eigval else 1.0,
    )
    delta = replace(delta, convolutions=tuple((f"{part}_conv1d", delta.sizes[part]) for part in "qkv"))
    full, linear = POST_NORM.layer(standard.attention(config, **more), mlp, norm), LINEAR.layer(delta, mlp, norm)
    layers = tuple(full if kind == "full_attention" else linear for kind in config.layer_types)
    return standard.architecture(config, layers, norm)


def as_in_files(arch: Architecture, shape: Callable[[str], tuple[int, ...] | None]) -> Architecture:
    """Returns the architecture with the layout of files that transformers saved.

    transformers 5 joins the convolutions of queries, keys and values when it loads a published checkpoint, and cuts
    them into equal thirds when it saves, whatever their sizes. It also renames a norm of attention layers.
    """

    def branch(number: int, one: Branch) -> Branch:
        layer = f"{arch.prefix}layers.{number}"
        if isinstance(one.spec, GatedDeltaSpec):
            in_files = [(name, shape(f"{layer}.{one.name}.{name}.weight")) for name, _ in one.spec.convolutions]
            channels = tuple((name, size[0]) for name, size in in_files if size is not None)
            if sum(size for _, size in channels) == sum(size for _, size in one.spec.convolutions):
                return replace(one, spec=replace(one.spec, convolutions=channels))
        if one.after == PUBLISHED_NORM and shape(f"{layer}.{PUBLISHED_NORM}.weight") is None:
            return replace(one, after=SAVED_NORM)
        return one

    def layer(number: int, one: Layer) -> Layer:
        sublayers = (
            replace(sublayer, branches=tuple(branch(number, each) for each in sublayer.branches))
            for sublayer in one.sublayers
        )
        return replace(one, sublayers=tuple(sublayers))

    return replace(arch, layers=tuple(layer(number, one) for number, one in enumerate(arch.layers)))
