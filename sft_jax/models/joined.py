"""Weights joined with the matrices of their adapters, for the matrix unit of a TPU.

Weights of one input share one input, to which the ``x_a`` of all adapters are added as columns. Two weights with an
adapter each::

                              weight 0    weight 1
    [ x    x_a 0    x_a 1 ] ·    b 0          0
                                  0          b 1

The transpose is one product, too: it gives the gradients of ``x`` and of each ``x_a``. The columns are rounded up to
those of the matrix unit, because a product over fewer takes as long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from sft_jax.typing import Array, Float

_COLUMNS = 128  # of the matrix unit


def stack(
    weights: Sequence[Float[Array, "in out"]], bs: Mapping[int, Float[Array, "R out"]], outputs: Sequence[Sequence[int]]
) -> list[Float[Array, "in+C *out"]]:
    """Returns ``[weight; 0; b; 0]`` for each weight, with its outputs as dimensions.

    Args:
        bs: of the weights that have an adapter, by index.
        outputs: the dimensions of the outputs of each weight.
    """
    stacks, columns = [], _rounded(sum(b.shape[0] for b in bs.values()))
    for i, (weight, dims) in enumerate(zip(weights, outputs, strict=True)):
        below = jnp.zeros((columns, weight.shape[1]), weight.dtype)
        if i in bs:
            below = lax.dynamic_update_slice(below, bs[i], (_first_rows(bs)[i], 0))
        # By heads before they are joined, so that the compiler need not copy the product.
        stacks.append(jnp.concatenate([weight.reshape(-1, *dims), below.reshape(-1, *dims)]))
    return stacks


def widen(x: Float[Array, "*B in"], x_a: Sequence[Float[Array, "*B R"]]) -> Float[Array, "*B in+C"]:
    """Returns ``[x, x_a, 0]``; ``x_a`` is that of all adapters in the order of their weights."""
    ranks = sum(one.shape[-1] for one in x_a)
    wide = jnp.concatenate([x, *x_a, jnp.zeros((*x.shape[:-1], _rounded(ranks) - ranks), x.dtype)], axis=-1)
    return lax.optimization_barrier(wide)  # otherwise each product would join them again


def narrow(
    d_wide: Float[Array, "*B in+C"], size: int, bs: Mapping[int, Float[Array, "R out"]]
) -> tuple[Float[Array, "*B in"], dict[int, Float[Array, "*B R"]]]:
    """Splits a gradient into those of ``x``, the first ``size`` columns, and of each ``x_a``, by index."""
    # Otherwise the compiler would transpose all of it, as it does the thin part, and with it the input of the layer.
    d_x, rest = jnp.split(with_layout_constraint(d_wide, Layout(tuple(range(d_wide.ndim)))), [size], axis=-1)
    return d_x, {i: rest[..., at : at + bs[i].shape[0]] for i, at in _first_rows(bs).items()}


def extend(
    dy: Float[Array, "*B out"],
    d_x_a: Float[Array, "*B R"],
    weight: Float[Array, "in out"],
    a: Float[Array, "in R"],
    inputs: Sequence[int],
) -> tuple[Float[Array, "*B out+C"], Float[Array, "*in out+C"]]:
    """Returns ``[dy, d_x_a, 0]`` and ``[weight, a, 0]``, the latter with its inputs as dimensions."""
    missing = _rounded(a.shape[1]) - a.shape[1]
    wide = jnp.concatenate([dy, d_x_a, jnp.zeros((*dy.shape[:-1], missing), dy.dtype)], axis=-1)
    parts = [weight, jnp.pad(a, ((0, 0), (0, missing)))]
    return wide, jnp.concatenate([part.reshape(*inputs, -1) for part in parts], axis=-1)


def _rounded(ranks: int) -> int:
    return -(-ranks // _COLUMNS) * _COLUMNS


def _first_rows(bs: Mapping[int, Array]) -> dict[int, int]:
    """The first row of each ``b`` among those that are added, by index."""
    ranks = [b.shape[0] for b in bs.values()]
    return {i: sum(ranks[:before]) for before, i in enumerate(bs)}
