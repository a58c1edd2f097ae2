"""Gemma 3: norms before and after attention and MLP, two rotary embeddings, five local layers per global layer."""

from __future__ import annotations

from typing import Any

from flax import nnx

from sft_jax.models.architecture import Architecture, Layer, Norm
from sft_jax.models.context import Context
from sft_jax.models.families import standard
from sft_jax.models.layers import Initializer, RMSNorm
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float


def read(config: Any) -> Architecture:
    norm, mlp, layers = Norm(config.rms_norm_eps, offset=1.0), standard.mlp(config), []
    for kind, window in zip(config.layer_types, standard.sliding_windows(config), strict=True):
        attention = standard.attention(
            config,
            rope=standard.rope(config.rope_parameters[kind], config.max_position_embeddings),
            scale=config.query_pre_attn_scalar**-0.5,
            window=window,
            softcap=config.attn_logit_softcapping,
            qk_norm=norm,
            qkv_bias=bool(config.attention_bias),
            o_bias=bool(config.attention_bias),
        )
        layers.append(Layer(attention, mlp, norm, SandwichBlock))
    return standard.architecture(
        config,
        tuple(layers),
        norm,
        embedding_scale=config.hidden_size**0.5,
        logits_softcap=config.final_logit_softcapping,
    )


class SandwichBlock(nnx.Module):
    """``x + norm(self_attn(norm(x)))``, then ``x + norm(mlp(norm(x)))``."""

    def __init__(self, layer: Layer, arch: Architecture, make: Initializer, stack: tuple[int, ...]):
        dim = arch.hidden_size
        self.input_layernorm = RMSNorm(dim, layer.norm, make, stack)
        self.self_attn = layer.mixer.module(dim, make, stack)
        self.post_attention_layernorm = RMSNorm(dim, layer.norm, make, stack)
        self.pre_feedforward_layernorm = RMSNorm(dim, layer.norm, make, stack)
        self.mlp = layer.mlp.module(dim, make, stack)
        self.post_feedforward_layernorm = RMSNorm(dim, layer.norm, make, stack)

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], Any]:
        mixer_context, mlp_context = context.split(2)
        mixed, cache = self.self_attn(self.input_layernorm(x), mixer_context)
        x = constrain(x + self.post_attention_layernorm(mixed), *context.stream)
        computed = self.mlp(self.pre_feedforward_layernorm(x), mlp_context)
        return constrain(x + self.post_feedforward_layernorm(computed), *context.stream), cache
