"""Mixtral: Mistral with a mixture of experts in each layer."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import standard
from sft_jax.models.families.standard import RouterSpec

TENSORS = standard.expert_tensors(stored="block_sparse_moe", names=("w1", "w3", "w2"))


def read(config: Any) -> Architecture:
    router = RouterSpec(config.num_local_experts, config.num_experts_per_tok)
    experts = standard.mixture(config, router, config.intermediate_size)
    return standard.decoder(config, standard.attention(config), experts, tensors=TENSORS)
