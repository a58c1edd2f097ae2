"""LFM2: short convolutions between layers of attention."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import hybrid, standard
from sft_jax.models.mlp import MLPSpec
from sft_jax.models.recurrent.short_conv import ShortConvSpec

ORDER = standard.Order(before_mixer="operator_norm", before_mlp="ffn_norm", mlp="feed_forward")


def read(config: Any) -> Architecture:
    return decoder(config, [mlp(_intermediate_size(config))] * config.num_hidden_layers)


def decoder(config: Any, mlps: list[Any], tensors: tuple[tuple[str, Any], ...] = ()) -> Architecture:
    """Returns a decoder of short convolutions and attention.

    Args:
        mlps: the MLP or mixture of experts of each layer.
        tensors: as in :class:`Architecture`.
    """
    norm = Norm(config.norm_eps)
    attention = standard.attention(config, qk_norm=norm, o_name="out_proj", norm_names=("q_layernorm", "k_layernorm"))
    mixers = {
        "full_attention": ("self_attn", attention),
        "conv": ("conv", ShortConvSpec(config.conv_L_cache, bool(config.conv_bias))),
    }
    layers = hybrid.layers(config, mixers, mlps, norm, ORDER)
    return standard.architecture(config, layers, norm, tensors=(("norm", "embedding_norm"), *tensors))


def mlp(size: int) -> MLPSpec:
    """Returns the spec of the MLP."""
    return MLPSpec(size, names=("w3", "w2"), gate_name="w1")


def _intermediate_size(config: Any) -> int:
    """Returns two thirds of ``intermediate_size``, scaled and rounded up to a multiple, if it is to be adjusted."""
    size = config.intermediate_size
    if not config.block_auto_adjust_ff_dim:
        return size
    size = int(2 * size / 3)
    if config.block_ffn_dim_multiplier is None:
        return size
    multiple = config.block_multiple_of
    return multiple * -(-int(config.block_ffn_dim_multiplier * size) // multiple)
