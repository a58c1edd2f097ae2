"""Granite 4: Mamba-2 and attention in turn, Granite's scales; without experts."""

from dataclasses import replace
from typing import Any

from sft_jax.errors import UserError
from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import hybrid, standard
from sft_jax.models.mlp import MLPSpec


def read(config: Any) -> Architecture:
    if config.num_local_experts:
        raise UserError(f"num_local_experts: {config.num_local_experts} is not supported; supported is 0")
    norm, activation = Norm(config.rms_norm_eps), hybrid.activation(config, "hidden_act")
    order = standard.Order(mlp="shared_mlp", scale=config.residual_multiplier)
    mamba = hybrid.mamba2(config, norm, out_bias=bool(config.mamba_proj_bias))
    mixers = {"full_attention": ("self_attn", _attention(config)), "linear_attention": ("mamba", mamba)}
    mlp = MLPSpec(config.shared_intermediate_size, activation, names=("", "output_linear"), fused="input_linear")
    layers = tuple(replace(order, mixer=name).layer(spec, mlp, norm) for name, spec in hybrid.by_type(config, mixers))
    return standard.architecture(
        config,
        layers,
        norm,
        embedding_scale=config.embedding_multiplier,
        logits_scale=1.0 / config.logits_scaling,
    )


def _attention(config: Any) -> Any:
    if config.position_embedding_type not in (None, "rope", "nope"):
        raise UserError(
            f"position_embedding_type: {config.position_embedding_type!r} is not supported; supported are rope and nope"
        )
    bias = bool(config.attention_bias)
    attention = standard.attention(config, scale=config.attention_multiplier, qkv_bias=bias, o_bias=bias)
    return attention if config.position_embedding_type == "rope" else replace(attention, rope=None)
