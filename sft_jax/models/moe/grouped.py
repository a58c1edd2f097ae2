"""Products of consecutive groups of rows with a matrix each, with or without an adapter.

``jax.lax.ragged_dot`` multiplies all rows by all matrices where XLA has no kernel for it, which is everywhere in jax
0.10: 128 times the work for 128 experts. Here a Pallas kernel computes them on TPUs, and a loop over blocks of rows
elsewhere.

Rows beyond all groups, and their gradients, are unspecified. Products are summed in float32 and have the dtype of their
rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sft_jax.models.moe import blocks
from sft_jax.models.remat import ADAPTER, checkpoint_name
from sft_jax.typing import Array, Float, Int

More = tuple[Float[Array, "m R"], Float[Array, "E R out"]]


@jax.custom_vjp
def grouped_dot(
    x: Float[Array, "m in"], weights: Float[Array, "E in out"], sizes: Int[Array, "E"]
) -> Float[Array, "m out"]:
    """Multiplies the first ``sizes[0]`` rows by ``weights[0]``, the next ``sizes[1]`` by ``weights[1]``, and so on."""
    return dot(x, weights, sizes)


def _forward(x: Array, weights: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return dot(x, weights, sizes), (x, weights, sizes)


def _backward(residuals: tuple[Array, Array, Array], d_out: Array) -> tuple[Array, Array, None]:
    x, weights, sizes = residuals
    # The compiler removes the second product if the weights are not trained.
    return dot(d_out, weights, sizes, transposed=True), outer(x, d_out, sizes, weights.dtype), None


grouped_dot.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def adapted_dot(
    x: Float[Array, "m in"],
    weights: Float[Array, "E in out"],
    a: Float[Array, "E in R"],
    b: Float[Array, "E R out"],
    sizes: Int[Array, "E"],
    scale: float,
) -> Float[Array, "m out"]:
    """Returns ``x · W + scale · (x · A) · B`` for the matrices of each group, rounded once."""
    return _adapted_forward(x, weights, a, b, sizes, scale)[0]


def _adapted_forward(
    x: Array, weights: Array, a: Array, b: Array, sizes: Array, scale: float
) -> tuple[Array, tuple[Array, ...]]:
    a = jnp.swapaxes(a, 1, 2)  # the layout that the compiler gives to a matrix with few columns
    x_a = checkpoint_name(dot(x, a, sizes, transposed=True), ADAPTER) * jnp.asarray(scale, x.dtype)
    return dot(x, weights, sizes, more=(x_a, b)), (x, weights, a, b, sizes, x_a)


def _adapted_backward(scale: float, residuals: tuple[Array, ...], d_out: Array) -> tuple[Any, ...]:
    x, weights, a, b, sizes, x_a = residuals
    d_x_a = dot(d_out, b, sizes, transposed=True) * jnp.asarray(scale, x.dtype)
    d_x = dot(d_out, weights, sizes, transposed=True, more=(d_x_a, a))
    d_a = jnp.swapaxes(outer(d_x_a, x, sizes, a.dtype), 1, 2)
    return d_x, outer(x, d_out, sizes, weights.dtype), d_a, outer(x_a, d_out, sizes, b.dtype), None


adapted_dot.defvjp(_adapted_forward, _adapted_backward)


def dot(
    x: Float[Array, "m in"],
    weights: Float[Array, "E in out"],
    sizes: Int[Array, "E"],
    transposed: bool = False,
    more: More | None = None,
) -> Float[Array, "m out"]:
    """Returns the products of groups of rows; not differentiable.

    Args:
        transposed: whether ``weights`` are ``[E, out, in]``.
        more: other rows and weights, whose products are added before the sum is rounded.
    """
    from sft_jax.models.moe import pallas  # only for models with experts: its library takes a while to import

    on_tpu, elsewhere = (
        lambda x, weights, sizes, more, compute=compute: compute(x, weights, sizes, transposed, more)
        for compute in (pallas.dot, blocks.dot)
    )
    return lax.platform_dependent(x, weights, sizes, more, tpu=on_tpu, default=elsewhere)


def outer(
    x: Float[Array, "m in"], y: Float[Array, "m out"], sizes: Int[Array, "E"], dtype: Any
) -> Float[Array, "E in out"]:
    """Returns ``Σ x yᵀ`` over the rows of each group, summed in float32; not differentiable."""
    from sft_jax.models.moe import pallas

    on_tpu, elsewhere = (
        lambda x, y, sizes, compute=compute: compute(x, y, sizes, dtype) for compute in (pallas.outer, blocks.outer)
    )
    return lax.platform_dependent(x, y, sizes, tpu=on_tpu, default=elsewhere)
