"""Sends rows, the pairs of a token and one of its experts, through the experts of a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sft_jax.models.moe.products import ExpertMatrix, grouped
from sft_jax.models.symbolic import instantiate, values_and_perturbed
from sft_jax.typing import Array, Float, Int

Compute = Callable[[Array, Any, Callable[[Array, ExpertMatrix], Array]], Array]
"""From rows, matrices and a function that multiplies rows by the matrix of their expert, to outputs."""


@dataclass(frozen=True)
class Rows:
    """How rows are computed.

    Attributes:
        compute: the function of an expert.
        scale_inputs: whether weights multiply the inputs of experts, not their outputs.
        size: the number of rows that are computed at a time.
    """

    compute: Compute
    scale_inputs: bool
    size: int


class _Sorted(NamedTuple):
    """Rows sorted by expert; those of experts that are not on this device come last.

    Three tokens with the experts ``[0 2] [1 2] [0 1]`` become the groups ``0 2 │ 1 2 │ 0 1`` of experts 0, 1 and 2.
    """

    order: Int[Array, "m"]  # the index of each row before sorting, padded
    experts: Int[Array, "m"]
    sizes: Int[Array, "E"]  # number of rows of each expert

    @staticmethod
    def of(chosen: Int[Array, "n k"], first: Array | int, num_experts: int, size: int) -> _Sorted:
        local = chosen.reshape(-1) - first
        local = jnp.where((local >= 0) & (local < num_experts), local, num_experts)
        order = jnp.argsort(local)
        padding = [(0, -order.shape[0] % size)]
        sizes = jnp.bincount(local, length=num_experts + 1)[:num_experts].astype(jnp.int32)
        experts = jnp.minimum(local[order], num_experts - 1)
        return _Sorted(jnp.pad(order, padding), jnp.pad(experts, padding), sizes)

    def part(self, i: Array | int, size: int) -> tuple[Int[Array, "r"], Array, Int[Array, "r"], Int[Array, "E"]]:
        """Returns the indices of the rows of a part, which of them exist here, their experts and the groups' sizes."""
        start = i * size
        order, experts = (lax.dynamic_slice(one, (start,), (size,)) for one in (self.order, self.experts))
        ends = jnp.cumsum(self.sizes)
        sizes = jnp.clip(ends, start, start + size) - jnp.clip(ends - self.sizes, start, start + size)
        return order, start + jnp.arange(size, dtype=jnp.int32) < ends[-1], experts, sizes


def through_experts(
    rows: Rows,
    tokens: Float[Array, "n D"],
    weights: Float[Array, "n k"],
    matrices: Any,
    chosen: Int[Array, "n k"],
    first: Array | int,
    num_experts: int,
) -> Float[Array, "n D"]:
    """Returns ``Σ weight · expert(token)`` over those chosen experts of each token that are on this device.

    Args:
        matrices: of the experts ``first … first + num_experts``.
    """
    ordered = _Sorted.of(chosen, first, num_experts, rows.size)
    if ordered.order.shape[0] == rows.size:
        return _part(rows, 0, jnp.zeros(tokens.shape, jnp.float32), tokens, weights, matrices, ordered).astype(
            tokens.dtype
        )
    return _in_parts(rows, tokens, weights, matrices, ordered)


def _part(
    rows: Rows,
    i: Array | int,
    total: Float[Array, "n D"],
    tokens: Float[Array, "n D"],
    weights: Float[Array, "n k"],
    matrices: Any,
    ordered: _Sorted,
) -> Float[Array, "n D"]:
    """Adds the outputs of a part of the rows."""
    order, exists, experts, sizes = ordered.part(i, rows.size)
    token = order // weights.shape[1]
    outs = _outputs(rows, tokens[token], weights.reshape(-1)[order], matrices, exists, experts, sizes)
    return total.at[token].add(outs.astype(jnp.float32))


def _outputs(
    rows: Rows, x: Array, weights: Array, matrices: Any, exists: Array, experts: Array, sizes: Array
) -> Float[Array, "r D"]:
    # Products leave rows of no group unspecified, and so are their gradients.
    x = jnp.where(exists[:, None], x, 0)
    products = partial(grouped, sizes=sizes, experts=experts)
    outs = rows.compute(x * weights[:, None] if rows.scale_inputs else x, matrices, products)
    outs = outs if rows.scale_inputs else outs * weights[:, None]
    return jnp.where(exists[:, None], outs, 0)


def _in_parts(rows: Rows, tokens: Array, weights: Array, matrices: Any, ordered: _Sorted) -> Float[Array, "n D"]:
    """Computes as many parts as there are rows on this device; the backward pass computes each part again."""

    @jax.custom_vjp
    def run(tokens: Array, weights: Array, matrices: Any, ordered: _Sorted) -> Array:
        def body(i: Array, total: Array) -> Array:
            return _part(rows, i, total, tokens, weights, matrices, ordered)

        return _loop(rows, ordered, body, jnp.zeros(tokens.shape, jnp.float32)).astype(tokens.dtype)

    def forward(*primals: Any) -> tuple[Array, Any]:
        values, perturbed = values_and_perturbed(primals)
        return run(*values), (values, tuple(jax.tree.leaves(perturbed[2])))

    def backward(residuals: Any, d_out: Any) -> tuple[Any, Any, Any, None]:
        (tokens, weights, matrices, ordered), trained = residuals
        return *_backward(rows, tokens, weights, matrices, ordered, trained, d_out), None

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(tokens, weights, matrices, ordered)


def _loop(rows: Rows, ordered: _Sorted, body: Callable[[Array, Any], Any], start: Any) -> Any:
    return lax.fori_loop(0, (jnp.sum(ordered.sizes) + rows.size - 1) // rows.size, body, start)


def _backward(
    rows: Rows, tokens: Array, weights: Array, matrices: Any, ordered: _Sorted, trained: tuple[Any, ...], d_out: Any
) -> tuple[Array, Array, Any]:
    d_out = instantiate(d_out)
    leaves, tree = jax.tree.flatten(matrices)
    diff = [leaf for leaf, one in zip(leaves, trained, strict=True) if one]

    def merged(diff: list[Array]) -> Any:
        rest = iter(diff)
        return tree.unflatten([next(rest) if one else leaf for leaf, one in zip(leaves, trained, strict=True)])

    def body(i: Array, carry: Any) -> Any:
        d_tokens, d_weights, d_diff = carry
        order, exists, experts, sizes = ordered.part(i, rows.size)
        token = order // weights.shape[1]

        def outputs(x: Array, weights: Array, diff: list[Array]) -> Array:
            return _outputs(rows, x, weights, merged(diff), exists, experts, sizes)

        _, transpose = jax.vjp(outputs, tokens[token], weights.reshape(-1)[order], diff)
        dx, dw, more = transpose(d_out[token].astype(tokens.dtype))
        at = jnp.where(exists, order, d_weights.shape[0])
        d_weights = d_weights.at[at].set(dw.astype(jnp.float32), mode="drop")
        d_diff = [old + new.astype(jnp.float32) for old, new in zip(d_diff, more, strict=True)]
        return d_tokens.at[token].add(dx.astype(jnp.float32)), d_weights, d_diff

    start = (
        jnp.zeros(tokens.shape, jnp.float32),
        jnp.zeros(weights.size, jnp.float32),
        [jnp.zeros(leaf.shape, jnp.float32) for leaf in diff],
    )
    d_tokens, d_weights, d_diff = _loop(rows, ordered, body, start)
    gradients = iter([total.astype(leaf.dtype) for total, leaf in zip(d_diff, diff, strict=True)])
    d_matrices = tree.unflatten([next(gradients) if one else None for one in trained])
    return d_tokens.astype(tokens.dtype), d_weights.reshape(weights.shape).astype(weights.dtype), d_matrices
