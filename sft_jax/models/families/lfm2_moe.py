"""LFM2 MoE: LFM2 with dense layers first, then mixtures of experts."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import lfm2, standard
from sft_jax.models.families.standard import RouterSpec

TENSORS = (
    ("feed_forward.gate.expert_bias", "feed_forward.expert_bias"),
    *standard.expert_tensors("feed_forward", names=("w1", "w3", "w2")),
)


def read(config: Any) -> Architecture:
    router = RouterSpec(
        config.num_experts,
        config.num_experts_per_tok,
        "sigmoid",
        correction="expert_bias" if config.use_expert_bias else None,
        normalize=bool(config.norm_topk_prob),
        eps=1e-6,
        scale=config.routed_scaling_factor,
    )
    experts, dense = standard.mixture(config, router, config.moe_intermediate_size), lfm2.mlp(config.intermediate_size)
    mlps = [dense if i < config.num_dense_layers else experts for i in range(config.num_hidden_layers)]
    return lfm2.decoder(config, mlps, TENSORS)
