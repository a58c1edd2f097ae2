"""OLMoE: a mixture of experts in each layer, query and key norms over all heads."""

from typing import Any

from sft_jax.errors import UserError
from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard
from sft_jax.models.families.standard import RouterSpec


def read(config: Any) -> Architecture:
    if config.clip_qkv is not None:
        raise UserError("clip_qkv is not supported")
    bias, norm = bool(config.attention_bias), Norm(config.rms_norm_eps)
    attention = standard.attention(config, qk_norm=norm, qk_norm_heads=True, qkv_bias=bias, o_bias=bias)
    router = RouterSpec(config.num_experts, config.num_experts_per_tok, normalize=bool(config.norm_topk_prob))
    experts = standard.mixture(config, router, config.intermediate_size)
    return standard.decoder(config, attention, experts, tensors=standard.expert_tensors())
