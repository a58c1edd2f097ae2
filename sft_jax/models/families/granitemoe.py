"""Granite 3 MoE: Granite with a mixture of experts in each layer."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import standard
from sft_jax.models.families.standard import RouterSpec

TENSORS = (
    ("block_sparse_moe.experts.gate_up_proj.weight", "block_sparse_moe.input_linear.weight"),
    ("block_sparse_moe.experts.down_proj.weight", "block_sparse_moe.output_linear.weight"),
    ("block_sparse_moe.router", "block_sparse_moe.router.layer"),
)


def read(config: Any) -> Architecture:
    bias = bool(config.attention_bias)
    router = RouterSpec(config.num_local_experts, config.num_experts_per_tok, "softmax_of_top")
    return standard.decoder(
        config,
        standard.attention(config, scale=config.attention_multiplier, qkv_bias=bias, o_bias=bias),
        standard.mixture(config, router, config.intermediate_size, router_name="router"),
        order=standard.Order(scale=config.residual_multiplier, mlp="block_sparse_moe"),
        embedding_scale=config.embedding_multiplier,
        logits_scale=1.0 / config.logits_scaling,
        tensors=TENSORS,
    )
