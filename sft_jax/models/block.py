"""The decoder block: a mixer and an MLP with norms and residuals."""

from __future__ import annotations

from typing import Any

from flax import nnx

from sft_jax.models.architecture import Architecture, Layer
from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, RMSNorm
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float


class Block(nnx.Module):
    """``x + after(self_attn(before(x)))``, then ``x + after(mlp(before(x)))``, with the norms of :class:`Residual`."""

    def __init__(self, layer: Layer, arch: Architecture, make: Initializer, stack: tuple[int, ...]):
        self.residual = layer.residual
        self.self_attn = layer.mixer.module(arch.hidden_size, make, stack)
        self.mlp = layer.mlp.module(arch.hidden_size, make, stack)
        for name in layer.residual.norms:
            setattr(self, name, RMSNorm(arch.hidden_size, layer.norm, make, stack))

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the hidden states after the layer, and the mixer's cache entries for these tokens."""
        norms = self.residual
        mixer_context, mlp_context = context.split(2)
        mixed, cache = self.self_attn(self._normalize(norms.before_mixer, x), mixer_context)
        x = constrain(x + self._normalize(norms.after_mixer, mixed), *context.stream)
        computed = self.mlp(self._normalize(norms.before_mlp, x), mlp_context)
        return constrain(x + self._normalize(norms.after_mlp, computed), *context.stream), cache

    def _normalize(self, name: str | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x if name is None else getattr(self, name)(x)
