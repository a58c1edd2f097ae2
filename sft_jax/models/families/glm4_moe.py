"""GLM-4.5 and 4.6: a router with sigmoids and corrections, shared experts, dense layers first."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard
from sft_jax.models.families.standard import RouterSpec


def read(config: Any) -> Architecture:
    qk_norm = Norm(config.rms_norm_eps) if config.use_qk_norm else None
    attention = standard.attention(config, qk_norm=qk_norm, qkv_bias=bool(config.attention_bias))
    return decoder(config, attention)


def decoder(config: Any, attention: Any) -> Architecture:
    """Returns the decoder of GLM-4.5 or DeepSeek-V3 with its attention."""
    mtp = f"model.layers.{config.num_hidden_layers}."  # the layer that predicts a further token
    return standard.decoder(config, attention, mlps(config), tensors=standard.expert_tensors(), outside=(mtp,))


def mlps(config: Any) -> list[Any]:
    """Returns the MLP or mixture of experts of each layer, as in DeepSeek-V3."""
    size = config.moe_intermediate_size
    shared = standard.mlp(config, intermediate_size=size * config.n_shared_experts)
    experts, dense = standard.mixture(config, router(config), size, shared=shared), standard.mlp(config)
    first = config.first_k_dense_replace
    return [dense if i < first else experts for i in range(config.num_hidden_layers)]


def router(config: Any) -> RouterSpec:
    """Returns the spec of the router of DeepSeek-V3."""
    return RouterSpec(
        config.n_routed_experts,
        config.num_experts_per_tok,
        "sigmoid",
        correction="e_score_correction_bias",
        groups=config.n_group,
        top_groups=config.topk_group,
        normalize=bool(config.norm_topk_prob),
        eps=1e-20,
        scale=config.routed_scaling_factor,
    )
