"""StableLM 2: layer norms, partly rotated heads."""

from typing import Any

from sft_jax.errors import UserError
from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    if config.qk_layernorm:
        raise UserError("qk_layernorm is not supported")
    attention = standard.attention(config, qkv_bias=bool(config.use_qkv_bias))
    norm = Norm(config.layer_norm_eps, centered=True, has_bias=True)
    order = (
        standard.Order(before_mlp="input_layernorm", parallel=True)
        if config.use_parallel_residual
        else standard.Order()
    )
    return standard.decoder(config, attention, standard.mlp(config), norm, order)
