"""Granite 4: Mamba-2 and attention in turn, Granite's scales; maybe experts beside the MLP."""

from dataclasses import replace
from typing import Any

from sft_jax.errors import UserError
from sft_jax.models.architecture import Architecture, Branch, Layer, Norm
from sft_jax.models.families import granitemoe, hybrid, standard
from sft_jax.models.mlp import MLPSpec


def read(config: Any) -> Architecture:
    norm, activation = Norm(config.rms_norm_eps), standard.activation(config, "hidden_act")
    order = standard.Order(mlp="shared_mlp", scale=config.residual_multiplier)
    mamba = hybrid.mamba2(config, norm, out_bias=bool(config.mamba_proj_bias))
    mixers = {"full_attention": ("self_attn", _attention(config)), "linear_attention": ("mamba", mamba)}
    mlp = MLPSpec(config.shared_intermediate_size, activation, names=("", "output_linear"), fused="input_linear")
    layers = hybrid.layers(config, mixers, [mlp] * config.num_hidden_layers, norm, order)
    if config.num_local_experts:
        layers = tuple(_with_experts(layer, granitemoe.experts(config)) for layer in layers)
    return standard.architecture(
        config,
        layers,
        norm,
        embedding_scale=config.embedding_multiplier,
        logits_scale=1.0 / config.logits_scaling,
        tensors=granitemoe.TENSORS,
    )


def _attention(config: Any) -> Any:
    if config.position_embedding_type not in (None, "rope", "nope"):
        raise UserError(
            f"position_embedding_type: {config.position_embedding_type!r} is not supported; supported are rope and nope"
        )
    bias = bool(config.attention_bias)
    attention = standard.attention(config, scale=config.attention_multiplier, qkv_bias=bias, o_bias=bias)
    return attention if config.position_embedding_type == "rope" else replace(attention, rope=None)


def _with_experts(layer: Layer, experts: Any) -> Layer:
    """Returns the layer with experts that read what its MLP reads."""
    mixer, mlp = layer.sublayers
    branch = Branch(granitemoe.EXPERTS, experts, mlp.branches[0].before)
    return replace(layer, sublayers=(mixer, replace(mlp, branches=(branch, *mlp.branches))))
