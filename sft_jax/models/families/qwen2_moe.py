"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with a mixture of experts, and a shared expert with a gate."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import qwen3_moe, standard


def read(config: Any) -> Architecture:
    shared = standard.mlp(config, intermediate_size=config.shared_expert_intermediate_size)
    mlps = qwen3_moe.mlps(config, shared=shared, shared_name="shared_expert", shared_gate="shared_expert_gate")
    attention = standard.attention(config, qkv_bias=True)
    return standard.decoder(config, attention, mlps, tensors=standard.expert_tensors())
