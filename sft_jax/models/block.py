"""The decoder block: mixers and MLPs with norms and residuals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flax import nnx

from sft_jax.models.architecture import Architecture, Branch, Layer
from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, make_norm
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float


class Block(nnx.Module):
    """The module of a :class:`Layer`."""

    def __init__(self, layer: Layer, arch: Architecture, make: Initializer, stack: tuple[int, ...]):
        self.layer = layer
        for branch in layer.branches:
            setattr(self, branch.name, branch.spec.module(arch.hidden_size, make, stack))
        for name in layer.norms:
            setattr(self, name, make_norm(arch.hidden_size, layer.norm, make, stack))
        if layer.scalar is not None:
            setattr(self, layer.scalar, make.buffer(1.0, (*stack, 1), ("norm",)))

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Returns the hidden states after the layer, and the cache entries of each mixer for these tokens by name.

        A mixer that reads the keys and values of another layer has none.
        """
        contexts = iter(context.split(len(self.layer.branches)))
        cache: dict[str, Any] = {}
        for sublayer in self.layer.sublayers:
            outs = [self._branch(branch, x, next(contexts), cache) for branch in sublayer.branches]
            total = self._normalize(sublayer.after, sum(outs[1:], outs[0]))
            x = constrain(x + _scaled(total, sublayer.scale), *context.stream)
        if self.layer.scalar is not None:
            x = x * getattr(self, self.layer.scalar)[...].astype(x.dtype)
        return x, cache

    def _branch(self, branch: Branch, x: Array, context: Context, cache: dict[str, Any]) -> Float[Array, "B T D"]:
        """Returns the output of a branch, and stores the cache entries of a mixer in ``cache``."""
        module = getattr(self, branch.name)
        x = _scaled(self._normalize(branch.before, x), branch.in_scale)
        if branch.spec.is_mixer:
            earlier = None if context.cache is None else context.cache.get(branch.name)
            x, entries = module(x, replace(context, cache=earlier))
            if entries is not None:
                cache[branch.name] = entries
        else:
            x = module(x, context)
        return self._normalize(branch.after, _scaled(x, branch.out_scale))

    def _normalize(self, name: str | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x if name is None else getattr(self, name)(x)


def _scaled(x: Array, scale: float) -> Array:
    return x if scale == 1.0 else x * scale
