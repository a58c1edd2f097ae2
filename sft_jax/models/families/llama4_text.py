"""Llama 4: attention in chunks, layers without rotation whose queries grow with the position, one expert a token."""

from dataclasses import replace
from typing import Any

from sft_jax.models.architecture import Architecture, Norm, Temperature
from sft_jax.models.families import standard
from sft_jax.models.families.standard import RouterSpec
from sft_jax.models.moe.experts import ExpertsSpec
from sft_jax.models.moe.mixture import MixtureSpec

ORDER = standard.Order(mlp="feed_forward")


def read(config: Any) -> Architecture:
    norm, bias = Norm(config.rms_norm_eps), bool(config.attention_bias)
    rotated = standard.attention(config, interleaved=True, qkv_bias=bias, o_bias=bias)
    qk_norm = Norm(config.rms_norm_eps, has_weight=False) if config.use_qk_norm else None
    plain, rotated = replace(rotated, rope=None), replace(rotated, qk_norm=qk_norm, qk_norm_last=True)
    if config.attn_temperature_tuning:
        plain = replace(plain, temperature=Temperature(config.attn_scale, int(config.floor_scale), offset=1))
    experts, dense = _experts(config), standard.mlp(config, intermediate_size=config.intermediate_size_mlp)
    layers = []
    for i, kind in enumerate(config.layer_types):
        chunk = config.attention_chunk_size if kind == "chunked_attention" else None
        mixer = replace(rotated if config.no_rope_layers[i] else plain, chunk=chunk)
        layers.append(ORDER.layer(mixer, experts if i in config.moe_layers else dense, norm))
    tensors = standard.experts_together("feed_forward")
    return standard.architecture(config, tuple(layers), norm, tensors=tensors)


def _experts(config: Any) -> MixtureSpec:
    return MixtureSpec(
        RouterSpec(config.num_local_experts, config.num_experts_per_tok, "sigmoid", normalize=False),
        ExpertsSpec(config.intermediate_size, standard.activation(config), stored_in_out=True, peft_swaps=True),
        router_name="router",
        shared=standard.mlp(config),
        shared_name="shared_expert",
        scale_inputs=True,
    )
