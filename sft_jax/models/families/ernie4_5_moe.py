"""ERNIE 4.5 MoE: ERNIE 4.5 with experts and shared experts from some layer on."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import standard
from sft_jax.models.families.standard import RouterSpec

TENSORS = (
    ("mlp.gate.e_score_correction_bias", "mlp.moe_statics.e_score_correction_bias"),
    *standard.expert_tensors(),
)


def read(config: Any) -> Architecture:
    bias = bool(config.use_bias)
    attention = standard.attention(config, interleaved=True, qkv_bias=bias, o_bias=bias)
    router = RouterSpec(config.moe_num_experts, config.moe_k, correction="e_score_correction_bias", correction_dims=2)
    size, count = config.moe_intermediate_size, config.moe_num_shared_experts
    shared = standard.mlp(config, bias, intermediate_size=size * count) if count else None
    experts, dense = standard.mixture(config, router, size, shared=shared), standard.mlp(config, bias)
    first, last, every = config.moe_layer_start_index, config.moe_layer_end_index, config.moe_layer_interval
    last = config.num_hidden_layers - 1 if last < 0 else last
    mlps = [experts if (i + 1) % every == 0 and first <= i <= last else dense for i in range(config.num_hidden_layers)]
    return standard.decoder(config, attention, mlps, tensors=TENSORS)
