"""Products of groups of rows as a loop over blocks of rows, on devices without a kernel for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from sft_jax.typing import Array, Float, Int


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


def dot(
    x: Float[Array, "m in"],
    weights: Float[Array, "E in out"],
    sizes: Int[Array, "E"],
    transposed: bool = False,
    more: tuple[Float[Array, "m R"], Float[Array, "E R out"]] | None = None,
) -> Float[Array, "m out"]:
    """:func:`sft_jax.models.moe.grouped.dot` with a cost that depends on the groups, not on their number."""
    blocks = _Blocks.of(sizes, x.shape[0])
    rows = [blocks.scatter(one) for one in ((x,) if more is None else (x, more[0]))]
    dims = (((1,), (1 if transposed else 0,)), ((), ()))

    def block(i: Array, out: Array) -> Array:
        ones = [lax.dynamic_index_in_dim(one, i, keepdims=False) for one in rows]
        weight = lax.dynamic_index_in_dim(weights, blocks.groups[i], keepdims=False)
        product = lax.dot_general(ones[0], weight, dims, preferred_element_type=jnp.float32)
        if more is not None:
            other = lax.dynamic_index_in_dim(more[1], blocks.groups[i], keepdims=False)
            product += jnp.dot(ones[1], other, preferred_element_type=jnp.float32)
        return lax.dynamic_update_index_in_dim(out, product.astype(out.dtype), i, 0)

    width = weights.shape[1 if transposed else 2]
    start = jnp.zeros((*rows[0].shape[:2], width), x.dtype)
    return blocks.gather(lax.fori_loop(0, blocks.num, block, start))


def outer(
    x: Float[Array, "m in"], y: Float[Array, "m out"], sizes: Int[Array, "E"], dtype: Any
) -> Float[Array, "E in out"]:
    """:func:`sft_jax.models.moe.grouped.outer`."""
    blocks = _Blocks.of(sizes, x.shape[0])
    rows = [blocks.scatter(one) for one in (x, y)]

    def block(i: Array, total: Array) -> Array:
        left, right = (lax.dynamic_index_in_dim(one, i, keepdims=False) for one in rows)
        product = lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        group = blocks.groups[i]
        old = lax.dynamic_index_in_dim(total, group, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, old + product, group, 0)

    shape = (sizes.shape[0], x.shape[1], y.shape[1])
    return lax.fori_loop(0, blocks.num, block, jnp.zeros(shape, jnp.float32)).astype(dtype)
