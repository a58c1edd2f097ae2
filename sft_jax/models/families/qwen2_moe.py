"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with a mixture of experts, and a shared expert with a gate."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import qwen3_moe, standard


def read(config: Any) -> Architecture:
    attention = standard.attention(config, qkv_bias=True)
    return standard.decoder(config, attention, mlps(config), tensors=standard.expert_tensors())


def mlps(config: Any) -> list[Any]:
    """Returns the MLP or mixture of experts of each layer."""
    return qwen3_moe.mlps(config, **shared_expert(config))


def shared_expert(config: Any) -> dict[str, Any]:
    """Returns the fields of a mixture that has a shared expert with a gate."""
    shared = standard.mlp(config, intermediate_size=config.shared_expert_intermediate_size)
    return {"shared": shared, "shared_name": "shared_expert", "shared_gate": "shared_expert_gate"}
