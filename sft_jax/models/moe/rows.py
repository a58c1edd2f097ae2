"""Sends rows, the pairs of a token and one of its experts, through the experts of a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sft_jax.models.moe.products import grouped
from sft_jax.models.symbolic import instantiate, values_and_perturbed
from sft_jax.typing import Array, Float, Int

Products = Callable[..., Array]
"""Multiplies rows by the matrix of their expert; see :func:`~sft_jax.models.moe.products.grouped`."""
Compute = Callable[[Array, Array, Any, Products], Array]
"""From rows, their weights, matrices and products to the weighted outputs of experts."""


@dataclass(frozen=True)
class Rows:
    """How rows are computed.

    Attributes:
        compute: the function of an expert.
        size: the number of rows that are computed at a time; None for all at once, if all experts are on this device.
    """

    compute: Compute
    size: int | None


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
    if rows.size is None:
        return _at_once(rows, tokens, weights, matrices, chosen, num_experts)
    return _in_parts(rows, tokens, weights, matrices, _Sorted.of(chosen, first, num_experts, rows.size))


# -- all rows at once -------------------------------------------------------------------------------------------------


def _at_once(
    rows: Rows, tokens: Array, weights: Array, matrices: Any, chosen: Int[Array, "n k"], num_experts: int
) -> Float[Array, "n D"]:
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat).astype(jnp.int32)
    places = jnp.argsort(order).astype(jnp.int32).reshape(chosen.shape)
    sizes = jnp.bincount(flat, length=num_experts).astype(jnp.int32)
    products = partial(grouped, sizes=sizes, experts=flat[order])
    x, w = _take(tokens, order, places), _take(weights.reshape(-1), order, places.reshape(-1, 1))
    return _collect(rows.compute(x, w, matrices, products), order, places)


@jax.custom_vjp
def _take(values: Float[Array, "n *D"], order: Int[Array, "m"], places: Int[Array, "n k"]) -> Float[Array, "m *D"]:
    """Returns the value of each row in the order of experts.

    This and :func:`_collect` are the transpose of each other. Both gather, which is cheaper than a scatter with sums.

    Args:
        order: the index of each row before sorting; row i is of token ``i // k``.
        places: of the rows of each token after sorting.
    """
    return values[order // places.shape[1]]


@jax.custom_vjp
def _collect(outs: Float[Array, "m *D"], order: Int[Array, "m"], places: Int[Array, "n k"]) -> Float[Array, "n *D"]:
    """Returns the sums over the rows of each token, computed in float32."""
    return jnp.sum(outs[places], axis=1, dtype=jnp.float32).astype(outs.dtype)


def _forward_of(function: Callable[..., Array]) -> Callable[..., tuple[Array, tuple[Array, Array]]]:
    return lambda values, order, places: (function(values, order, places), (order, places))


def _backward_of(transpose: Callable[..., Array]) -> Callable[..., tuple[Array, None, None]]:
    return lambda indices, d_out: (transpose(d_out, *indices), None, None)


_take.defvjp(_forward_of(_take), _backward_of(_collect))
_collect.defvjp(_forward_of(_collect), _backward_of(_take))


# -- rows of the experts of this device, in parts ---------------------------------------------------------------------


class _Sorted(NamedTuple):
    """Rows sorted by expert; those of experts that are not on this device come last.

    Three tokens with the experts ``[0 2] [1 2] [0 1]`` become the groups ``0 2 │ 1 2 │ 0 1`` of experts 0, 1 and 2.
    """

    order: Int[Array, "m"]  # the index of each row before sorting, padded
    experts: Int[Array, "m"]  # num_experts for rows that are not on this device
    sizes: Int[Array, "E"]  # number of rows of each expert

    @staticmethod
    def of(chosen: Int[Array, "n k"], first: Array | int, num_experts: int, size: int) -> _Sorted:
        local = chosen.reshape(-1) - first
        local = jnp.where((local >= 0) & (local < num_experts), local, num_experts)
        order = jnp.argsort(local)
        padding = [(0, -order.shape[0] % size)]
        sizes = jnp.bincount(local, length=num_experts + 1)[:num_experts].astype(jnp.int32)
        return _Sorted(jnp.pad(order, padding), jnp.pad(local[order], padding, constant_values=num_experts), sizes)

    def part(self, i: Array | int, size: int) -> tuple[Int[Array, "r"], Int[Array, "r"], Int[Array, "E"]]:
        """Returns the indices of the rows of a part, their experts and the groups' sizes."""
        start = i * size
        order, experts = (lax.dynamic_slice(one, (start,), (size,)) for one in (self.order, self.experts))
        ends = jnp.cumsum(self.sizes)
        sizes = jnp.clip(ends, start, start + size) - jnp.clip(ends - self.sizes, start, start + size)
        return order, experts, sizes


def _in_parts(rows: Rows, tokens: Array, weights: Array, matrices: Any, ordered: _Sorted) -> Float[Array, "n D"]:
    """Computes as many parts as there are rows on this device; the backward pass computes each part again.

    Products leave rows of no expert unspecified, and so are their gradients. Their index is out of bounds where
    outputs and gradients are summed, which drops them.
    """

    @jax.custom_vjp
    def run(tokens: Array, weights: Array, matrices: Any, ordered: _Sorted) -> Array:
        def body(i: Array, total: Array) -> Array:
            part = _Part.of(rows, ordered, i, weights.shape)
            outs = part.outputs(rows, tokens[part.token], weights.reshape(-1)[part.order], matrices)
            return total.at[part.into].add(outs.astype(jnp.float32), mode="drop")

        return _loop(rows, ordered, body, jnp.zeros(tokens.shape, jnp.float32)).astype(tokens.dtype)

    def forward(*primals: Any) -> tuple[Array, Any]:
        values, perturbed = values_and_perturbed(primals)
        return run(*values), (values, tuple(jax.tree.leaves(perturbed[2])))

    def backward(residuals: Any, d_out: Any) -> tuple[Any, Any, Any, None]:
        (tokens, weights, matrices, ordered), trained = residuals
        return *_backward(rows, tokens, weights, matrices, ordered, trained, d_out), None

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(tokens, weights, matrices, ordered)


class _Part(NamedTuple):
    """Some of the sorted rows."""

    order: Int[Array, "r"]  # the index of each row before sorting
    token: Int[Array, "r"]
    into: Int[Array, "r"]  # the token, or out of bounds for a row of no expert of this device
    experts: Int[Array, "r"]
    sizes: Int[Array, "E"]

    @staticmethod
    def of(rows: Rows, ordered: _Sorted, i: Array | int, shape: tuple[int, ...]) -> _Part:
        assert rows.size is not None
        order, experts, sizes = ordered.part(i, rows.size)
        token = order // shape[1]
        return _Part(order, token, jnp.where(experts < sizes.shape[0], token, shape[0]), experts, sizes)

    def outputs(self, rows: Rows, x: Array, weights: Array, matrices: Any) -> Float[Array, "r D"]:
        return rows.compute(x, weights, matrices, partial(grouped, sizes=self.sizes, experts=self.experts))


def _loop(rows: Rows, ordered: _Sorted, body: Callable[[Array, Any], Any], start: Any) -> Any:
    assert rows.size is not None
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
        part = _Part.of(rows, ordered, i, weights.shape)

        def outputs(x: Array, weights: Array, diff: list[Array]) -> Array:
            return part.outputs(rows, x, weights, merged(diff))

        _, transpose = jax.vjp(outputs, tokens[part.token], weights.reshape(-1)[part.order], diff)
        dx, dw, more = transpose(d_out[part.token].astype(tokens.dtype))
        at = jnp.where(part.into < tokens.shape[0], part.order, d_weights.shape[0])
        d_weights = d_weights.at[at].set(dw.astype(jnp.float32), mode="drop")
        d_diff = [old + new.astype(jnp.float32) for old, new in zip(d_diff, more, strict=True)]
        return d_tokens.at[part.into].add(dx.astype(jnp.float32), mode="drop"), d_weights, d_diff

    start = (
        jnp.zeros(tokens.shape, jnp.float32),
        jnp.zeros(weights.size, jnp.float32),
        [jnp.zeros(leaf.shape, jnp.float32) for leaf in diff],
    )
    d_tokens, d_weights, d_diff = _loop(rows, ordered, body, start)
    gradients = iter([total.astype(leaf.dtype) for total, leaf in zip(d_diff, diff, strict=True)])
    d_matrices = tree.unflatten([next(gradients) if one else None for one in trained])
    return d_tokens.astype(tokens.dtype), d_weights.reshape(weights.shape).astype(weights.dtype), d_matrices
