"""GPT-OSS: attention sinks, windows in every other layer, clamped experts with biases that are stored together."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import standard
from sft_jax.models.families.standard import RouterSpec
from sft_jax.models.moe.experts import ExpertsSpec
from sft_jax.models.moe.mixture import MixtureSpec


def read(config: Any) -> Architecture:
    bias = bool(config.attention_bias)
    attention = standard.attention(config, sinks=True, qkv_bias=bias, o_bias=bias)
    router = RouterSpec(config.num_local_experts, config.num_experts_per_tok, "softmax_of_top", use_bias=True)
    experts = ExpertsSpec(
        config.intermediate_size,
        use_bias=True,
        interleaved=True,
        clamp=(config.swiglu_limit, config.swiglu_alpha),
        stored_in_out=True,
    )
    mixture = MixtureSpec(router, experts, router_name="router")
    return standard.decoder(config, attention, mixture, tensors=standard.experts_together())
