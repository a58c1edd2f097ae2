"""The activation xIELU, whose parameters are trained with the weights."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from sft_jax.models.layers import Initializer
from sft_jax.typing import Array, Float


class XIELU(nnx.Module):
    """A quadratic for positive and an exponential for negative inputs (Huang & Schlag 2024), in float32."""

    def __init__(self, make: Initializer, stack: tuple[int, ...]):
        beta = 0.5
        self.alpha_p = make.constant(math.log(math.expm1(0.8)), (*stack, 1), ("norm",))
        self.alpha_n = make.constant(math.log(math.expm1(0.8 - beta)), (*stack, 1), ("norm",))
        self.beta = make.buffer(beta, stack, ())
        self.eps = make.buffer(-1e-6, stack, ())

    def __call__(self, x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
        wide, beta = x.astype(jnp.float32), self.beta[...]
        positive = jax.nn.softplus(self.alpha_p[...].astype(jnp.float32))
        negative = beta + jax.nn.softplus(self.alpha_n[...].astype(jnp.float32))
        low = (jnp.expm1(jnp.minimum(wide, self.eps[...])) - wide) * negative
        return (jnp.where(wide > 0, positive * wide * wide, low) + beta * wide).astype(x.dtype)
