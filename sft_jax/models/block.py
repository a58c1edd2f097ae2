"""The decoder block: a mixer and an MLP with norms and residuals."""

from __future__ import annotations

from typing import Any

from flax import nnx

from sft_jax.models.architecture import Architecture, Layer
from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, make_norm
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float


class Block(nnx.Module):
    """``x + after(mixer(before(x)))``, then the same with the MLP; in the order of :class:`Residual`."""

    def __init__(self, layer: Layer, arch: Architecture, make: Initializer, stack: tuple[int, ...]):
        self.residual = layer.residual
        self.self_attn = layer.mixer.module(arch.hidden_size, make, stack)
        self.mlp = layer.mlp.module(arch.hidden_size, make, stack)
        for name in layer.residual.norms:
            setattr(self, name, make_norm(arch.hidden_size, layer.norm, make, stack))

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the hidden states after the layer, and the mixer's cache entries for these tokens."""
        residual = self.residual
        mixer_context, mlp_context = context.split(2)
        mixed, cache = self.self_attn(self._normalize(residual.before_mixer, x), mixer_context)
        mixed = self._added(residual.after_mixer, mixed)
        if residual.parallel:
            computed = self._added(residual.after_mlp, self.mlp(self._normalize(residual.before_mlp, x), mlp_context))
            return constrain(x + mixed + computed, *context.stream), cache
        x = constrain(x + mixed, *context.stream)
        computed = self._added(residual.after_mlp, self.mlp(self._normalize(residual.before_mlp, x), mlp_context))
        return constrain(x + computed, *context.stream), cache

    def _normalize(self, name: str | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x if name is None else getattr(self, name)(x)

    def _added(self, norm: str | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = self._normalize(norm, x)
        return x if self.residual.scale == 1.0 else x * self.residual.scale
