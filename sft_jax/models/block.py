"""The pre-norm decoder block."""

from __future__ import annotations

from typing import Any

from flax import nnx

from sft_jax.models.architecture import Architecture, Layer
from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, RMSNorm
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float


class PreNormBlock(nnx.Module):
    """``x + self_attn(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, layer: Layer, arch: Architecture, make: Initializer, stack: tuple[int, ...]):
        dim = arch.hidden_size
        self.input_layernorm = RMSNorm(dim, layer.norm, make, stack)
        self.self_attn = layer.mixer.module(dim, make, stack)
        self.post_attention_layernorm = RMSNorm(dim, layer.norm, make, stack)
        self.mlp = layer.mlp.module(dim, make, stack)

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the hidden states after the layer, and the mixer's cache entries for these tokens."""
        mixer_context, mlp_context = context.split(2)
        mixed, cache = self.self_attn(self.input_layernorm(x), mixer_context)
        x = constrain(x + mixed, *context.stream)
        x = x + self.mlp(self.post_attention_layernorm(x), mlp_context)
        return constrain(x, *context.stream), cache
