"""Command R7B: mixer and MLP in parallel behind one layer norm, local layers rotate, global ones do not."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    bias = bool(config.attention_bias)
    attention = standard.attention(config, interleaved=True, qkv_bias=bias, o_bias=bias)
    return standard.decoder(
        config,
        attention,
        standard.mlp(config),
        Norm(config.layer_norm_eps, centered=True),
        standard.Order(before_mlp="input_layernorm", parallel=True),
        lambda layer, window: None if window is None else attention.rope,
        logits_scale=config.logit_scale,
    )
