"""Products with a quantized matrix for NVIDIA GPUs in Pallas Triton that never write the dequantized matrix to memory.

Each program dequantizes the tile of the matrix that it multiplies, to the dtype of ``x``, as
:func:`sft_jax.models.quantize.dequantize` does: the product is the same but for the order of its sums. A tile is
dequantized again for each tile of rows. One conversion and one multiplication are cheap for int8; nf4 takes fifteen
selections per weight, which is more than the tensor cores take to multiply it by 128 rows. So this saves memory, and
time only where the rows are few and reading the matrix takes most of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from sft_jax.models.quantize import INT8_BLOCK, NF4_BLOCK, NF4_LEVELS, Arrays, Format
from sft_jax.typing import Array, Float, Int

_BLOCKS = {"int8": (INT8_BLOCK, 1), "nf4": (NF4_BLOCK, 1)}


class Tiles(NamedTuple):
    """Tile sizes of a program, and its Triton launch parameters. Not measured on a GPU yet."""

    rows: int = 128  # of x; fewer rows take a smaller power of two
    columns: int = 128  # of the matrix's outputs
    inputs: int = 128  # of the matrix's inputs, a multiple of the blocks
    warps: int = 8
    stages: int = 3


class _Static(NamedTuple):
    fmt: Format
    tiles: Tiles
    transposed: bool


def unsupported_reason(fmt: Format, in_dim: int, out_dim: int, tiles: Tiles = Tiles()) -> str | None:  # noqa: B008
    """Returns why :func:`quantized_dot` does not take a matrix ``[in, out]``; None if it does."""
    if fmt.block != _BLOCKS[fmt.method]:
        return f"has blocks of {fmt.block[0]} inputs and {fmt.block[1]} outputs, not of {_BLOCKS[fmt.method][0]} and 1"
    if in_dim % tiles.inputs or out_dim % tiles.columns:
        return f"is {in_dim} × {out_dim}, not a multiple of {tiles.inputs} × {tiles.columns}"
    if fmt.method == "nf4" and fmt.scale_block % tiles.columns:
        return f"has scales in groups of {fmt.scale_block} outputs, not a multiple of {tiles.columns}"
    return None


def quantized_dot(
    x: Float[Array, "*B in"],
    arrays: Arrays,
    fmt: Format,
    transposed: bool = False,
    tiles: Tiles = Tiles(),  # noqa: B008
    interpret: bool = False,
) -> Float[Array, "*B out"]:
    """Computes ``x · W`` for a quantized matrix ``W [in, out]``, summed in float32 and rounded to the dtype of ``x``.

    Args:
        x: 16-bit.
        arrays: the arrays of the format, of one matrix (no stack); see :class:`sft_jax.models.quantize.Format`.
        transposed: compute ``x · Wᵀ`` for ``x [*B, out]``, as the gradient of the input is.
        interpret: interpret the kernel, on any device.
    """
    in_dim, out_dim = fmt.weight_shape(arrays["codes"].shape)
    assert unsupported_reason(fmt, in_dim, out_dim, tiles) is None, (fmt, in_dim, out_dim)
    assert x.shape[-1] == (out_dim if transposed else in_dim), (x.shape, in_dim, out_dim)
    rows = x.size // x.shape[-1]
    tiles = tiles._replace(rows=min(tiles.rows, max(16, pl.next_power_of_2(rows))))
    flat = x.reshape(rows, x.shape[-1])
    flat = jnp.pad(flat, [(0, -rows % tiles.rows), (0, 0)])
    static = _Static(fmt, tiles, transposed)
    halves = _halves(fmt)
    width, outputs = (tiles.inputs, in_dim) if transposed else (tiles.columns, out_dim)
    # In nf4, a byte has an input of each half of a block: x and the gradient are [rows, blocks, halves, half].
    by_half = (in_dim // (halves * _half(fmt)), halves, _half(fmt))
    if transposed:
        x_spec = pl.BlockSpec((tiles.rows, out_dim), lambda i, j: (i, 0))
        out_spec = pl.BlockSpec((tiles.rows, tiles.inputs // NF4_BLOCK, 2, by_half[2]), lambda i, j: (i, j, 0, 0))
        out_shape: tuple[int, ...] = (flat.shape[0], *by_half)
        if halves == 1:
            out_spec, out_shape = pl.BlockSpec((tiles.rows, width), lambda i, j: (i, j)), (flat.shape[0], in_dim)
    else:
        flat = flat.reshape(flat.shape[0], *by_half) if halves == 2 else flat
        x_spec = pl.BlockSpec((tiles.rows, *flat.shape[1:]), lambda i, j: (i, *[0] * (flat.ndim - 1)))
        out_spec, out_shape = pl.BlockSpec((tiles.rows, width), lambda i, j: (i, j)), (flat.shape[0], out_dim)
    names = list(fmt.array_specs())
    out = pl.pallas_call(
        partial(_kernel, static=static),
        grid=(flat.shape[0] // tiles.rows, outputs // width),
        in_specs=[x_spec, *(_array_spec(name, arrays[name].shape, static) for name in names)],
        out_specs=out_spec,
        out_shape=jax.ShapeDtypeStruct(out_shape, x.dtype),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=f"quantized_dot_{fmt.method}{'_transposed' if transposed else ''}",
    )(flat, *(arrays[name] for name in names))
    return out.reshape(-1, outputs)[:rows].reshape(*x.shape[:-1], outputs)


def _halves(fmt: Format) -> int:
    return 2 if fmt.method == "nf4" else 1


def _half(fmt: Format) -> int:
    """Rows of codes in a block."""
    return fmt.block[0] // _halves(fmt)


def _array_spec(name: str, shape: tuple[int, ...], static: _Static) -> pl.BlockSpec:
    """The part of an array that belongs to a tile of the outputs of a program, and all of the other dimension."""
    fmt, tiles, transposed = static
    rows, columns = fmt.array_specs()[name].grain
    if transposed:
        return pl.BlockSpec((tiles.inputs // rows, shape[1]), lambda i, j: (j, 0))
    if columns > 1:  # offsets and steps of the scales, one for several tiles
        return pl.BlockSpec((shape[0], 1), lambda i, j: (0, j * tiles.columns // columns))
    return pl.BlockSpec((shape[0], tiles.columns), lambda i, j: (0, j))


def _kernel(x_ref: Any, *refs: Any, static: _Static) -> None:
    fmt, tiles, transposed = static
    *array_refs, out_ref = refs
    named = dict(zip(fmt.array_specs(), array_refs, strict=True))
    if transposed:
        steps, size = x_ref.shape[1] // tiles.columns, (tiles.rows, tiles.inputs // _halves(fmt))
    else:
        steps, size = named["codes"].shape[0] * _halves(fmt) // tiles.inputs, (tiles.rows, tiles.columns)

    def step(k: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        parts = _tile(named, k, static, x_ref.dtype)
        if transposed:
            x = x_ref[:, pl.ds(k * tiles.columns, tiles.columns)]
            return tuple(total + plt.dot(x, part, trans_b=True) for total, part in zip(totals, parts, strict=True))
        (total,) = totals
        for i, part in enumerate(parts):
            total += plt.dot(_inputs(x_ref, k, i, static), part)
        return (total,)

    start = tuple(jnp.zeros(size, jnp.float32) for _ in range(_halves(fmt) if transposed else 1))
    totals = lax.fori_loop(0, steps, step, start)
    if transposed and fmt.method == "nf4":
        for i, total in enumerate(totals):
            out_ref[:, :, i, :] = total.astype(out_ref.dtype).reshape(tiles.rows, -1, _half(fmt))
    else:
        out_ref[...] = totals[0].astype(out_ref.dtype)


def _inputs(x_ref: Any, k: Array, i: int, static: _Static) -> Array:
    """The inputs of step ``k`` of half ``i`` of the blocks ``[rows, inputs]``."""
    tiles = static.tiles
    if static.fmt.method == "int8":
        return x_ref[:, pl.ds(k * tiles.inputs, tiles.inputs)]
    blocks = tiles.inputs // NF4_BLOCK
    return x_ref[:, pl.ds(k * blocks, blocks), i, :].reshape(tiles.rows, tiles.inputs // 2)


def _tile(named: dict[str, Any], k: Array, static: _Static, dtype: Any) -> list[Float[Array, "in out"]]:
    """Dequantizes the tile of step ``k``: the whole of it, or the halves of its blocks in nf4."""
    fmt, tiles, transposed = static
    blocks = tiles.inputs // fmt.block[0]
    if transposed:  # one step of the outputs, and all inputs of the program
        columns = pl.ds(k * tiles.columns, tiles.columns)
        codes, scales = named["codes"][:, columns], named["scales"][:, columns]
        group = pl.ds(k * tiles.columns // fmt.scale_block, 1)
        of_group: tuple[Any, Any] = (slice(None), group)
    else:
        rows = tiles.inputs // _halves(fmt)
        codes, scales = named["codes"][pl.ds(k * rows, rows), :], named["scales"][pl.ds(k * blocks, blocks), :]
        of_group = (pl.ds(k * blocks, blocks), slice(None))
    if fmt.method == "int8":
        return [_scaled(codes.astype(jnp.float32), scales, fmt).astype(dtype)]
    factors = scales.astype(jnp.float32) * named["scale_step"][of_group] + named["scale_offset"][of_group]
    pairs = codes.astype(jnp.int32)
    return [_scaled(_level((pairs >> shift) & 15), factors, fmt).astype(dtype) for shift in (0, 4)]


def _scaled(values: Float[Array, "in out"], scales: Float[Array, "blocks out"], fmt: Format) -> Float[Array, "in out"]:
    blocked = values.reshape(scales.shape[0], _half(fmt), values.shape[1])
    return (blocked * scales[:, None, :]).reshape(values.shape)


def _level(codes: Int[Array, "in out"]) -> Float[Array, "in out"]:
    """The level of each code by four selections, one per bit."""
    levels: list[Any] = [jnp.full(codes.shape, level, jnp.float32) for level in NF4_LEVELS]
    for bit in range(4):
        is_set = (codes & (1 << bit)) != 0
        levels = [jnp.where(is_set, odd, even) for even, odd in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]
