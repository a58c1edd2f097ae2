"""Qwen3-MoE: Qwen3 with a mixture of experts in most layers."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard
from sft_jax.models.families.standard import RouterSpec


def read(config: Any) -> Architecture:
    bias, norm = bool(config.attention_bias), Norm(config.rms_norm_eps)
    attention = standard.attention(config, qk_norm=norm, qkv_bias=bias, o_bias=bias)
    return standard.decoder(config, attention, mlps(config), tensors=standard.expert_tensors())


def mlps(config: Any, **more: Any) -> list[Any]:
    """Returns the MLP or mixture of experts of each layer; ``more`` are fields of the mixture."""
    router = RouterSpec(config.num_experts, config.num_experts_per_tok, normalize=bool(config.norm_topk_prob))
    experts, dense = standard.mixture(config, router, config.moe_intermediate_size, **more), standard.mlp(config)
    step, only = config.decoder_sparse_step, config.mlp_only_layers
    is_dense = [i in only or (i + 1) % step != 0 for i in range(config.num_hidden_layers)]
    return [dense if one else experts for one in is_dense]
