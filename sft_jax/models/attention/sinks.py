"""Attention sinks added to the results of a kernel that has none.

A sink is one more score of a query, for a key whose value is zero (GPT-OSS; Xiao et al. 2023). So it scales the output
by the share of the other scores in the softmax. Totals are log-sum-exps of the scores of a query, in base two.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from sft_jax.typing import Array, Float

_LOG2_E = math.log2(math.e)


def add_sinks(
    sinks: Float[Array, "N"], out: Float[Array, "B T N H"], log_total: Float[Array, "B N T"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns output and totals with the sinks.

    A backward pass that recomputes weights from these totals, and reads the output, needs no other change.
    """
    with_sinks = jnp.logaddexp2(log_total, (_LOG2_E * sinks)[:, None])
    share = jnp.swapaxes(jnp.exp2(log_total - with_sinks), 1, 2)[..., None]
    return (out.astype(jnp.float32) * share).astype(out.dtype), with_sinks


def gradient_of_sinks(
    sinks: Float[Array, "N"], log_total: Float[Array, "B N T"], delta: Float[Array, "B N T"]
) -> Float[Array, "N"]:
    """Returns the gradient of the sinks.

    Args:
        log_total: the totals with the sinks.
        delta: the inner product of each output and its gradient.
    """
    weights = jnp.exp2((_LOG2_E * sinks)[:, None] - log_total)
    return -jnp.sum(weights * delta, axis=(0, 2))
