"""Products of consecutive groups of rows with a matrix each: ``megablox`` on TPUs, blocks of rows elsewhere.

``jax.lax.ragged_dot`` multiplies all rows by all matrices where XLA has no kernel for it, which is everywhere in jax
0.10: 128 times the work for 128 experts.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sft_jax.typing import Array, Float, Int


def grouped_dot(
    x: Float[Array, "m in"], weights: Float[Array, "E in out"], sizes: Int[Array, "E"], transposed: bool = False
) -> Float[Array, "m out"]:
    """Multiplies the first ``sizes[0]`` rows by ``weights[0]``, the next ``sizes[1]`` by ``weights[1]``, and so on.

    Sums in float32 and returns the dtype of ``x``, which is that of ``weights``. Rows beyond all groups, and their
    gradients, are unspecified.

    Args:
        transposed: whether ``weights`` are ``[E, out, in]``.
    """

    def on_tpu(x: Array, weights: Array, sizes: Array) -> Array:
        return megablox_dot(x, weights, sizes, transposed)

    def elsewhere(x: Array, weights: Array, sizes: Array) -> Array:
        return blocked_dot(x, weights, sizes, transposed)

    return lax.platform_dependent(x, weights, sizes, tpu=on_tpu, default=elsewhere)


# -- TPU --------------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def megablox_dot(
    x: Float[Array, "m in"],
    weights: Float[Array, "E in out"],
    sizes: Int[Array, "E"],
    transposed: bool = False,
    interpret: bool = False,
) -> Float[Array, "m out"]:
    """:func:`grouped_dot` by the Pallas kernels of jax, which skip what belongs to no group."""
    return _gmm(x, weights, sizes, transposed, interpret)


def _megablox_forward(x: Array, weights: Array, sizes: Array, transposed: bool, interpret: bool) -> tuple[Array, Any]:
    return _gmm(x, weights, sizes, transposed, interpret), (x, weights, sizes)


def _megablox_backward(transposed: bool, interpret: bool, residuals: Any, d_out: Array) -> tuple[Array, Array, None]:
    x, weights, sizes = residuals
    d_x = _gmm(d_out, weights, sizes, not transposed, interpret)
    left, right = (d_out, x) if transposed else (x, d_out)
    (rows, left), (num, inputs, outputs) = _padded(left, weights), weights.shape
    tiling = (rows, _tile(inputs, 1024), _tile(outputs, 768))
    with jax.numpy_dtype_promotion("standard"):  # the kernels mix dtypes
        d_weights = _kernels().tgmm(
            left.T, _padded(right, weights)[1], sizes, weights.dtype, tiling, num_actual_groups=num,
            interpret=interpret,
        )  # fmt: skip
    is_used = (sizes > 0)[:, None, None]  # the kernel leaves the matrix of an empty group as it was in memory
    return d_x, jnp.where(is_used, d_weights, jnp.zeros_like(d_weights)), None


megablox_dot.defvjp(_megablox_forward, _megablox_backward)


def _gmm(x: Array, weights: Array, sizes: Array, transposed: bool, interpret: bool) -> Array:
    inputs, outputs = weights.shape[:0:-1] if transposed else weights.shape[1:]
    rows, padded = _padded(x, weights)
    tiling = (rows, _tile(inputs, 2048), _tile(outputs, 768))
    with jax.numpy_dtype_promotion("standard"):  # the kernels mix dtypes
        out = _kernels().gmm(padded, weights, sizes, x.dtype, tiling, transpose_rhs=transposed, interpret=interpret)
    return out[: x.shape[0]]


def _padded(x: Array, weights: Array) -> tuple[int, Array]:
    """Returns the number of rows of a tile, and the rows padded to whole tiles."""
    size = 256 if x.shape[0] >= 128 * weights.shape[0] else 128
    return size, jnp.pad(x, [(0, -x.shape[0] % size), (0, 0)])


def _kernels() -> Any:
    return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


def _tile(size: int, most: int) -> int:
    """Returns the largest multiple of 128 up to ``most`` that divides a size rounded up to such a multiple."""
    whole = -(-size // 128) * 128
    return next(tile for tile in range(min(most, whole), 0, -128) if whole % tile == 0)


# -- other devices ----------------------------------------------------------------------------------------------------


class _Blocks(NamedTuple):
    """Rows in blocks that each belong to one group; groups are padded to whole blocks.

    Blocks of two, groups of three and one row::

        rows            0 1 2 │ 3
        places          0 1 2 4          in the blocks 0 1 │ 2 · │ 3 ·
        groups          0 0 1            of the blocks
    """

    size: int
    places: Int[Array, "m"]  # of the rows in the blocks
    groups: Int[Array, "b"]  # of the blocks
    num: Int[Array, ""]  # blocks that have rows

    @staticmethod
    def of(sizes: Int[Array, "E"], num_rows: int) -> _Blocks:
        size = 16
        while size < 256 and 2 * size * sizes.shape[0] <= num_rows:
            size *= 2
        blocks = -(-num_rows // size) + sizes.shape[0]
        each = (sizes + (size - 1)) // size
        ends, block_ends = jnp.cumsum(sizes), jnp.cumsum(each)
        row = jnp.arange(num_rows, dtype=jnp.int32)
        group = jnp.minimum(jnp.searchsorted(ends, row, side="right").astype(jnp.int32), sizes.shape[0] - 1)
        places = (block_ends - each)[group] * size + row - (ends - sizes)[group]
        places = jnp.where(row < ends[-1], places, blocks * size)  # rows of no group have no place
        groups = jnp.searchsorted(block_ends, jnp.arange(blocks, dtype=jnp.int32), side="right").astype(jnp.int32)
        return _Blocks(size, places, jnp.minimum(groups, sizes.shape[0] - 1), block_ends[-1])

    def scatter(self, rows: Float[Array, "m d"]) -> Float[Array, "b size d"]:
        flat = jnp.zeros((self.groups.shape[0] * self.size, rows.shape[1]), rows.dtype)
        return flat.at[self.places].set(rows, mode="drop", unique_indices=True).reshape(-1, self.size, rows.shape[1])

    def gather(self, blocks: Float[Array, "b size d"]) -> Float[Array, "m d"]:
        return blocks.reshape(-1, blocks.shape[-1]).at[self.places].get(mode="clip")


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked_dot(
    x: Float[Array, "m in"], weights: Float[Array, "E in out"], sizes: Int[Array, "E"], transposed: bool = False
) -> Float[Array, "m out"]:
    """:func:`grouped_dot` as a loop over blocks of rows; its cost depends on the groups, not on their number."""
    blocks = _Blocks.of(sizes, x.shape[0])
    return blocks.gather(_multiply(blocks.scatter(x), weights, blocks, transposed))


def _multiply(
    rows: Float[Array, "b size in"], weights: Float[Array, "E in out"], blocks: _Blocks, transposed: bool
) -> Float[Array, "b size out"]:
    def block(i: Array, out: Array) -> Array:
        one = lax.dynamic_index_in_dim(rows, i, keepdims=False)
        weight = lax.dynamic_index_in_dim(weights, blocks.groups[i], keepdims=False)
        dims = (((1,), (1 if transposed else 0,)), ((), ()))
        return lax.dynamic_update_index_in_dim(out, lax.dot_general(one, weight, dims), i, 0)

    width = weights.shape[1 if transposed else 2]
    return lax.fori_loop(0, blocks.num, block, jnp.zeros((*rows.shape[:2], width), rows.dtype))


def _forward(x: Array, weights: Array, sizes: Array, transposed: bool) -> tuple[Array, tuple[Array, Array, Array]]:
    return blocked_dot(x, weights, sizes, transposed), (x, weights, sizes)


def _backward(transposed: bool, residuals: tuple[Array, Array, Array], d_out: Array) -> tuple[Array, Array, None]:
    x, weights, sizes = residuals
    blocks = _Blocks.of(sizes, x.shape[0])
    rows, d_rows = blocks.scatter(x), blocks.scatter(d_out)
    factors = (d_rows, rows) if transposed else (rows, d_rows)

    def block(i: Array, total: Array) -> Array:
        left, right = (lax.dynamic_index_in_dim(array, i, keepdims=False) for array in factors)
        outer = lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        group = blocks.groups[i]
        old = lax.dynamic_index_in_dim(total, group, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, old + outer, group, 0)

    # The compiler removes the loop if the weights are not trained.
    d_weights = lax.fori_loop(0, blocks.num, block, jnp.zeros(weights.shape, jnp.float32))
    d_x = blocks.gather(_multiply(d_rows, weights, blocks, not transposed))
    return d_x, d_weights.astype(weights.dtype), None


blocked_dot.defvjp(_forward, _backward)
