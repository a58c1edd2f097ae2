"""Granite 3 MoE: Granite with a mixture of experts in each layer."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import standard
from sft_jax.models.families.standard import RouterSpec
from sft_jax.models.moe.mixture import MixtureSpec

EXPERTS = "block_sparse_moe"
TENSORS = (
    (f"{EXPERTS}.experts.gate_up_proj.weight", f"{EXPERTS}.input_linear.weight"),
    (f"{EXPERTS}.experts.down_proj.weight", f"{EXPERTS}.output_linear.weight"),
    (f"{EXPERTS}.router", f"{EXPERTS}.router.layer"),
)


def read(config: Any) -> Architecture:
    bias = bool(config.attention_bias)
    return standard.decoder(
        config,
        standard.attention(config, scale=config.attention_multiplier, qkv_bias=bias, o_bias=bias),
        experts(config),
        order=standard.Order(scale=config.residual_multiplier, mlp=EXPERTS),
        embedding_scale=config.embedding_multiplier,
        logits_scale=1.0 / config.logits_scaling,
        tensors=TENSORS,
    )


def experts(config: Any) -> MixtureSpec:
    """Returns the spec of the experts."""
    router = RouterSpec(config.num_local_experts, config.num_experts_per_tok, "softmax_of_top")
    return standard.mixture(config, router, config.intermediate_size, router_name="router")
