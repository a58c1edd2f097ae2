"""Products of groups of rows as Pallas kernels for TPUs, which skip what belongs to no group."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sft_jax.typing import Array, Float, Int

_MOST_INPUTS = 3072  # of a product that is summed in one step


def dot(
    x: Float[Array, "m in"],
    weights: Float[Array, "E in out"],
    sizes: Int[Array, "E"],
    transposed: bool = False,
    more: tuple[Float[Array, "m R"], Float[Array, "E R out"]] | None = None,
    interpret: bool = False,
) -> Float[Array, "m out"]:
    """:func:`sft_jax.models.moe.grouped.dot`.

    The grid visits, for each tile of outputs, each pair of a tile of rows and a group that has rows in it. Consecutive
    visits of a tile of rows keep it in fast memory, and consecutive tiles of a group keep its weights there.
    """
    num_rows, inputs, outputs = x.shape[0], x.shape[1], weights.shape[1 if transposed else 2]
    size = _rows_of_a_tile(num_rows, weights.shape[0])
    depth = inputs if inputs <= _MOST_INPUTS else _tile(inputs, 2048)
    width = outputs if outputs <= 768 else _tile(outputs, 768)
    with jax.numpy_dtype_promotion("standard"):  # the library mixes dtypes
        (offsets, groups, tiles), visits = _megablox().make_group_metadata(
            group_sizes=sizes, m=-(-num_rows // size) * size, tm=size, start_group=jnp.int32(0),
            num_nonzero_groups=sizes.shape[0], visit_empty_groups=False,
        )  # fmt: skip

    def rows(columns: int, step: bool) -> pl.BlockSpec:
        return pl.BlockSpec((size, columns), lambda n, i, k, offsets, groups, tiles: (tiles[i], k if step else 0))

    def matrix(block: tuple[int, int], where: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, *block), lambda n, i, k, offsets, groups, tiles: (groups[i], *where(n, k)))

    in_specs = [
        rows(depth, step=True),
        matrix((width, depth), lambda n, k: (n, k)) if transposed else matrix((depth, width), lambda n, k: (k, n)),
    ]
    arrays = [x, weights]
    if more is not None:
        in_specs += [rows(more[0].shape[1], step=False), matrix((more[0].shape[1], width), lambda n, k: (0, n))]
        arrays += more
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(-(-outputs // width), visits, -(-inputs // depth)),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((size, width), lambda n, i, k, offsets, groups, tiles: (tiles[i], n)),
        scratch_shapes=[pltpu.VMEM((size, width), jnp.float32)],
    )
    return pl.pallas_call(
        partial(_dot, inputs=inputs, transposed=transposed),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((num_rows, outputs), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * inputs * outputs,
            transcendentals=0,
            bytes_accessed=sum(one.size * one.dtype.itemsize for one in arrays) + num_rows * outputs * x.dtype.itemsize,
        ),
        interpret=interpret,
    )(offsets, groups, tiles, *arrays)


def _dot(
    offsets: Any, groups: Any, tiles: Any, x: Any, weights: Any, *rest: Any, inputs: int, transposed: bool
) -> None:
    *more, out, total = rest
    visit, step, steps = pl.program_id(1), pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    depth = x.shape[1]
    left, right = x[...], weights[...]
    if inputs % depth:  # what is read beyond the end of an array is unspecified
        left, right = (
            jnp.where(step * depth + lax.broadcasted_iota(jnp.int32, one.shape, axis) < inputs, one, 0)
            for one, axis in ((left, 1), (right, 1 if transposed else 0))
        )
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    total[...] += lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)

    @pl.when(step == steps - 1)
    def _() -> None:
        result = total[...]
        if more:
            result += jnp.dot(more[0][...], more[1][...], preferred_element_type=jnp.float32)
        row = tiles[visit] * out.shape[0] + lax.broadcasted_iota(jnp.int32, out.shape, 0)
        is_in_group = (row >= offsets[groups[visit]]) & (row < offsets[groups[visit] + 1])
        out[...] = jnp.where(is_in_group, result, out[...].astype(jnp.float32)).astype(out.dtype)


def outer(
    x: Float[Array, "m in"], y: Float[Array, "m out"], sizes: Int[Array, "E"], dtype: Any, interpret: bool = False
) -> Float[Array, "E in out"]:
    """:func:`sft_jax.models.moe.grouped.outer`, by the kernel of jax."""
    size, num = _rows_of_a_tile(x.shape[0], sizes.shape[0]), sizes.shape[0]
    x, y = (jnp.pad(one, [(0, -one.shape[0] % size), (0, 0)]) for one in (x, y))
    tiling = (size, _dividing_tile(x.shape[1], 1024), _dividing_tile(y.shape[1], 768))
    with jax.numpy_dtype_promotion("standard"):  # the kernel mixes dtypes
        out = _megablox().tgmm(x.T, y, sizes, dtype, tiling, num_actual_groups=num, interpret=interpret)
    is_used = (sizes > 0)[:, None, None]  # the kernel leaves the matrix of an empty group as it was in memory
    return jnp.where(is_used, out, jnp.zeros_like(out))


def _megablox() -> Any:
    return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


def _rows_of_a_tile(num_rows: int, num_groups: int) -> int:
    """Returns the size of the tiles of rows. A group whose rows begin and end inside tiles computes all of these."""
    return 256 if num_rows >= 1024 * num_groups else 128


def _tile(size: int, most: int) -> int:
    """Returns the multiple of 128 up to ``most`` whose multiples exceed a size by the least; the largest of these."""
    return min(range(128, most + 1, 128), key=lambda tile: (-(-size // tile) * tile, -tile))


def _dividing_tile(size: int, most: int) -> int:
    """Returns the largest multiple of 128 up to ``most`` that divides a size rounded up to such a multiple."""
    whole = -(-size // 128) * 128
    return next(tile for tile in range(min(most, whole), 0, -128) if whole % tile == 0)
