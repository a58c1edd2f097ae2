"""Phi-1.5 and Phi-2: attention and MLP in parallel, biases everywhere, a partial rotation."""

from typing import Any

from sft_jax.errors import UserError
from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    if config.qk_layernorm:
        raise UserError("qk_layernorm is not supported")
    norm = Norm(config.layer_norm_eps, centered=True, has_bias=True)
    return standard.decoder(
        config,
        standard.attention(config, qkv_bias=True, o_bias=True, o_name="dense"),
        standard.mlp(config, bias=True, gated=False, names=("fc1", "fc2")),
        norm,
        standard.Order(before_mlp="input_layernorm", parallel=True),
        lm_head_bias=True,
        tensors=(("norm", "final_layernorm"),),
    )
