"""Leaves out updates whose gradient is far larger than those before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sft_jax.typing import Array

_MEMORY = 50  # steps that the average remembers
_FIRST = 20  # steps before any gradient counts as a spike


class GuardState(NamedTuple):
    """The state of :func:`guard_spikes`.

    Attributes:
        average: of the norms of gradients that were no spikes, float32.
        num_seen: their number, int32.
        skipped: the number of spikes, int32.
    """

    inner: Any
    average: Array
    num_seen: Array
    skipped: Array


def guard_spikes(
    optimizer: optax.GradientTransformationExtraArgs, factor: float
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that a spike changes neither the parameters nor its state.

    A spike is a gradient whose norm is more than ``factor`` times the running average of those before it.
    """

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return GuardState(optimizer.init(params), jnp.zeros((), jnp.float32), zero, zero)

    def update(updates, state, params=None, **extra):
        norm = optax.tree.norm(updates).astype(jnp.float32)
        is_spike = (state.num_seen >= _FIRST) & (norm > jnp.float32(factor) * state.average)
        new_updates, inner = optimizer.update(updates, state.inner, params, **extra)
        one = jnp.int32(1)
        weight = 1 / jnp.minimum(state.num_seen + one, _MEMORY).astype(jnp.float32)
        seen = GuardState(inner, state.average + weight * (norm - state.average), state.num_seen + one, state.skipped)
        left_out = state._replace(skipped=state.skipped + one)
        kept = jax.tree.map(lambda new, old: jnp.where(is_spike, old, new), seen, left_out)
        return jax.tree.map(lambda new: jnp.where(is_spike, jnp.zeros_like(new), new), new_updates), kept

    return optax.GradientTransformationExtraArgs(init, update)
