"""The RMS norm of a recurrence's output, before or after it is multiplied by ``silu(gate)``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sft_jax.models.layers import Initializer
from sft_jax.typing import Array, Float


class GatedNorm(nnx.Module):
    """``norm(y) · silu(gate)``, or ``norm(y · silu(gate))``; computed in float32 and rounded once to the dtype of y.

    Attributes:
        num_groups: of channels that are normalized apart.
        before_gate: whether the norm comes before the product with the gate.
    """

    def __init__(
        self,
        dim: int,
        eps: float,
        make: Initializer,
        stack: tuple[int, ...],
        num_groups: int = 1,
        before_gate: bool = True,
    ):
        self.eps, self.num_groups, self.before_gate = eps, num_groups, before_gate
        self.weight = make.constant(1.0, (*stack, dim), ("norm",))

    def __call__(self, y: Float[Array, "*B C"], gate: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        gate, wide = jax.nn.silu(gate.astype(jnp.float32)), y.astype(jnp.float32)
        out = self._normalize(wide) * gate if self.before_gate else self._normalize(wide * gate)
        return out.astype(y.dtype)

    def _normalize(self, y: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        groups = y.reshape(*y.shape[:-1], self.num_groups, -1)
        groups = groups * lax.rsqrt(jnp.mean(groups * groups, axis=-1, keepdims=True) + self.eps)
        return groups.reshape(y.shape) * self.weight[...].astype(jnp.float32)
