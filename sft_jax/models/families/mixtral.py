"""Mixtral: Mistral with a mixture of experts in each layer."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import standard
from sft_jax.models.moe import ExpertsSpec

TENSORS = {
    "mlp.gate": "block_sparse_moe.gate",
    "mlp.experts.gate_proj": "block_sparse_moe.experts.{expert}.w1",
    "mlp.experts.down_proj": "block_sparse_moe.experts.{expert}.w2",
    "mlp.experts.up_proj": "block_sparse_moe.experts.{expert}.w3",
}


def read(config: Any) -> Architecture:
    experts = ExpertsSpec(config.num_local_experts, config.num_experts_per_tok, standard.mlp(config))
    return standard.decoder(config, standard.attention(config), experts, tensors=tuple(TENSORS.items()))
