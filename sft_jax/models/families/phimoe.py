"""Phi-3.5-MoE: sixteen experts of which ``sparsemixer`` chooses two, layer norms, biases of ``lm_head``."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard
from sft_jax.models.families.standard import RouterSpec

TENSORS = (
    ("mlp.router", "block_sparse_moe.gate"),
    *standard.expert_tensors(stored="block_sparse_moe", names=("w1", "w3", "w2")),
)


def read(config: Any) -> Architecture:
    bias = bool(config.attention_bias)
    router = RouterSpec(
        config.num_local_experts, config.num_experts_per_tok, "sparsemixer", jitter=config.router_jitter_noise
    )
    return standard.decoder(
        config,
        standard.attention(config, qkv_bias=bias, o_bias=bias),
        standard.mixture(config, router, config.intermediate_size, router_name="router"),
        Norm(config.rms_norm_eps, centered=True, has_bias=True),
        lm_head_bias=bool(config.lm_head_bias),
        tensors=TENSORS,
    )
