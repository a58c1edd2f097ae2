"""Brings tokens and the weights of their experts together, on one device or on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp

from sft_jax.models.context import Context
from sft_jax.models.moe.products import ExpertMatrix, grouped
from sft_jax.typing import Array, Float, Int

Compute = Callable[[Array, Any, Callable[[Array, ExpertMatrix], Array]], Array]
"""From rows, matrices and a function that multiplies rows by the matrix of their expert, to outputs."""


def dispatch(
    compute: Compute,
    matrices: Any,
    tokens: Float[Array, "B T D"],
    chosen: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    num_experts: int,
    scale_inputs: bool,
    context: Context,
    mesh: Any,
) -> Float[Array, "B T D"]:
    """Returns ``Σ weight · expert(token)`` over the chosen experts of each token. No token is dropped.

    Args:
        scale_inputs: compute ``Σ expert(weight · token)`` instead.
    """
    dim, per_token = tokens.shape[-1], chosen.shape[-1]
    out = _local(
        compute,
        matrices,
        tokens.reshape(-1, dim),
        chosen.reshape(-1, per_token),
        weights.reshape(-1, per_token).astype(tokens.dtype),
        num_experts,
        scale_inputs,
    )
    return out.reshape(tokens.shape)


def _local(
    compute: Compute,
    matrices: Any,
    tokens: Float[Array, "n D"],
    chosen: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    num_experts: int,
    scale_inputs: bool,
) -> Float[Array, "n D"]:
    """Computes on one device that has all experts.

    Rows, the pairs of a token and one of its experts, are sorted by expert: three tokens with the experts
    ``[0 2] [1 2] [0 1]`` become the groups ``0 2 │ 1 2 │ 0 1`` of experts 0, 1 and 2.
    """
    per_token, flat = chosen.shape[-1], chosen.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=num_experts).astype(jnp.int32)
    rows = tokens[order // per_token]
    row_weights = weights.reshape(-1)[order][:, None]
    if scale_inputs:
        rows = rows * row_weights
    outs = compute(rows, matrices, partial(grouped, sizes=sizes, experts=flat[order]))
    outs = outs if scale_inputs else outs * row_weights
    return jnp.zeros(tokens.shape, outs.dtype).at[order // per_token].add(outs)
