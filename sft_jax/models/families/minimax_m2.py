"""MiniMax-M2: a router with sigmoids and corrections, query and key norms over all heads, a partial rotation."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard
from sft_jax.models.families.standard import RouterSpec

TENSORS = (
    ("mlp.gate.e_score_correction_bias", "block_sparse_moe.e_score_correction_bias"),
    *standard.expert_tensors(stored="block_sparse_moe", names=("w1", "w3", "w2")),
)


def read(config: Any) -> Architecture:
    attention = standard.attention(config, qk_norm=Norm(config.rms_norm_eps), qk_norm_heads=True)
    router = RouterSpec(
        config.num_local_experts, config.num_experts_per_tok, "sigmoid", correction="e_score_correction_bias"
    )
    experts = standard.mixture(config, router, config.intermediate_size)
    return standard.decoder(config, attention, experts, tensors=TENSORS)
