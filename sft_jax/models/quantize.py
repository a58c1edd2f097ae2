"""Weights in 4 and 8 bits: pure functions from a matrix to smaller arrays and back.

Quantising is absmax scaling: a block of values is divided by its largest magnitude and each quotient replaced by the
number, its *code*, of the nearest of a few levels. ``nf4`` (QLoRA, Dettmers et al. 2023, section 3) has 16 levels at
quantiles of a normal distribution, in blocks of 64 inputs of one output channel; ``int8`` has 255 even ones.

A block of four values in nf4, and what is read back::

    values            0.30 -1.50 0.75 0.05       absmax 1.50
    quotients         0.20 -1.00 0.50 0.03
    nearest level     0.161 -1.0 0.441 0.0       codes 9 0 12 7
    packed            9 | 12 << 4 = 201, 0 | 7 << 4 = 112
    read back         0.24 -1.50 0.66 0.00

A byte has codes of both halves of a block, not of neighbours: halves that are multiples of a tile are unpacked in
place, where an interleaving would go through copies of the whole matrix in float32 (2,259 instead of 1,600 MiB a chip
for Llama-3-8B on 16 TPU v5e).

A scale of 32 bits for every 64 values would add half a bit to each, so nf4's scales are kept in 8 bits themselves
("double quantisation"): 256 scales share a float32 offset and step. They are neighbours along the output dimension,
so that every array has an input and an output dimension as the matrix has, and is split over devices along the same.
In total 0.516 bytes a weight; int8 takes 1.031 with a scale for 128 inputs.

A dimension that 64, 128 or 256 does not divide has blocks of its largest divisor below; nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax import lax

from sft_jax.errors import UserError
from sft_jax.typing import Array, Float, Int

Arrays = dict[str, Array]

NF4_BLOCK = 64  # inputs that share a scale
SCALE_BLOCK = 256  # nf4 scales that share an offset and a step
INT8_BLOCK = 128

# Quantiles of a standard normal distribution, eight at and below zero and eight above it, scaled to [-1, 1]
# (QLoRA, appendix E). Zero is one of them, so that it is kept exactly.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class Piece:
    """One of the arrays that a matrix becomes; each of its elements stands for ``grain`` elements of the matrix."""

    dtype: str
    grain: tuple[int, int]  # inputs, outputs


@dataclass(frozen=True)
class Format:
    """How a matrix ``[in, out]`` is kept.

    ``block`` inputs and outputs share a scale. ``scale_block`` nf4 scales, along the outputs, share offset and step.
    """

    method: str  # nf4 | int8
    block: tuple[int, int]
    scale_block: int = 1

    def pieces(self) -> dict[str, Piece]:
        """The arrays by name."""
        if self.method == "int8":
            return {"codes": Piece("int8", (1, 1)), "scales": Piece("float32", self.block)}
        per_scale_block = (self.block[0], self.scale_block)
        return {
            "codes": Piece("uint8", (2, 1)),
            "scales": Piece("uint8", self.block),
            "scale_step": Piece("float32", per_scale_block),
            "scale_offset": Piece("float32", per_scale_block),
        }

    def whole(self) -> tuple[int, int]:
        """Inputs and outputs of the smallest part of a matrix that can be quantised by itself."""
        return self.block[0], max(self.block[1], self.scale_block)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an array for a matrix, or a stack of them, of ``shape``."""
        *stack, in_dim, out_dim = shape
        rows, columns = self.pieces()[name].grain
        return (*stack, in_dim // rows, out_dim // columns)

    def weight_shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the matrix, or stack of them, that codes of a shape stand for."""
        *stack, rows, columns = codes
        per_row, per_column = self.pieces()["codes"].grain
        return (*stack, rows * per_row, columns * per_column)


def linear_format(method: str, in_dim: int, out_dim: int) -> Format:
    """The format of a linear layer's weight ``[in, out]``.

    Raises:
        UserError: nf4 and an odd number of inputs, because two codes share a byte.
    """
    if method == "int8":
        return Format("int8", (largest_divisor(in_dim, INT8_BLOCK), 1))
    if in_dim % 2:
        raise UserError(
            f"model.quantization: nf4 packs pairs of inputs, and a layer has {in_dim}, an odd number; use int8"
        )
    return Format("nf4", (2 * largest_divisor(in_dim // 2, NF4_BLOCK // 2), 1), largest_divisor(out_dim, SCALE_BLOCK))


def vocab_format(shape: tuple[int, ...], vocab_dim: int) -> Format:
    """int8 with one scale for each entry of the vocabulary: of the token table ``[V, D]`` or the head ``[D, V]``."""
    return Format("int8", (1, shape[1]) if vocab_dim == 0 else (shape[0], 1))


def largest_divisor(size: int, most: int) -> int:
    """The largest number up to ``most`` that divides ``size``."""
    return next(n for n in range(min(size, most), 0, -1) if size % n == 0)


@partial(jax.jit, static_argnames="fmt")
def quantize(weight: Float[Array, "in out"], fmt: Format) -> Arrays:
    """A matrix as the arrays of ``fmt``; both dimensions are multiples of ``fmt.whole()``."""
    weight = weight.astype(jnp.float32)
    return _quantize_nf4(weight, fmt) if fmt.method == "nf4" else _quantize_int8(weight, fmt)


def dequantize(arrays: Arrays, fmt: Format, dtype: jnp.dtype | type) -> Float[Array, "*L in out"]:
    """The matrix, or stack of them, computed in float32 and rounded once to ``dtype``."""
    if fmt.method == "int8":
        return _scaled(arrays["codes"].astype(jnp.float32), arrays["scales"], fmt.block).astype(dtype)
    packed = _halved(arrays["codes"], fmt)  # [*L, in/block, 1, block/2, out]
    codes = (packed >> jnp.asarray([0, 4], jnp.uint8).reshape(2, 1, 1)) & jnp.uint8(15)
    values = _nf4_level(codes) * _scales(arrays, fmt)[..., None, None, :]
    return values.astype(dtype).reshape(fmt.weight_shape(arrays["codes"].shape))


def _quantize_int8(weight: Float[Array, "in out"], fmt: Format) -> Arrays:
    """``codes = round(127 · w / absmax)``, half to even; ``scales = absmax / 127``."""
    scales = _absmax(weight, fmt.block) / 127
    quotients = _scaled(weight, _reciprocal(scales), fmt.block)
    return {"codes": jnp.clip(jnp.round(quotients), -127, 127).astype(jnp.int8), "scales": scales}


def _quantize_nf4(weight: Float[Array, "in out"], fmt: Format) -> Arrays:
    """Codes against the exact scales, as in the reference; then the scales in 8 bits."""
    absmax = _absmax(weight, fmt.block)
    quotients = _scaled(weight, _reciprocal(absmax), fmt.block)
    codes = jnp.zeros(weight.shape, jnp.uint8)
    for low, high in pairwise(NF4_LEVELS):
        codes += (quotients > jnp.float32((low + high) / 2)).astype(jnp.uint8)
    grouped = absmax.reshape(absmax.shape[0], -1, fmt.scale_block)
    offset = grouped.min(axis=-1)
    step = (grouped.max(axis=-1) - offset) / 255
    numbers = jnp.round((grouped - offset[..., None]) * _reciprocal(step)[..., None])
    low, high = jnp.moveaxis(codes.reshape(-1, 2, fmt.block[0] // 2, codes.shape[1]), 1, 0)
    return {
        "codes": (low | (high << jnp.uint8(4))).reshape(-1, codes.shape[1]),
        "scales": jnp.clip(numbers, 0, 255).astype(jnp.uint8).reshape(absmax.shape),
        "scale_step": step,
        "scale_offset": offset,
    }


def _halved(packed: Int[Array, "*L in/2 out"], fmt: Format) -> Int[Array, "*L blocks 1 half out"]:
    *stack, rows, columns = packed.shape
    half = fmt.block[0] // 2
    return packed.reshape(*stack, rows // half, 1, half, columns)


def _scales(arrays: Arrays, fmt: Format) -> Float[Array, "*L blocks out"]:
    numbers = arrays["scales"].astype(jnp.float32)
    grouped = numbers.reshape(*numbers.shape[:-1], -1, fmt.scale_block)
    return (grouped * arrays["scale_step"][..., None] + arrays["scale_offset"][..., None]).reshape(numbers.shape)


def _nf4_level(codes: Int[Array, "*S"]) -> Float[Array, "*S"]:
    """Levels by four rounds of selection, one a bit: about as fast as a table on a CPU, and it needs no gather.

    The levels are tied to the codes. As bare constants they would be the same for every layer of a scan, and XLA for
    GPUs computes such things before the loop: sixteen arrays of the shape of each matrix, in memory throughout.
    """
    codes, *levels = lax.optimization_barrier((codes, *(jnp.full((), level, jnp.float32) for level in NF4_LEVELS)))
    for bit in range(4):
        is_set = (codes & jnp.uint8(1 << bit)) != 0
        levels = [jnp.where(is_set, odd, even) for even, odd in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]


def _absmax(weight: Float[Array, "in out"], block: tuple[int, int]) -> Float[Array, "in/b out/c"]:
    rows, columns = block
    return jnp.abs(weight).reshape(weight.shape[0] // rows, rows, -1, columns).max(axis=(1, 3))


def _scaled(
    values: Float[Array, "*L in out"], scales: Float[Array, "*L in/b out/c"], block: tuple[int, int]
) -> Float[Array, "*L in out"]:
    """Each value times the scale of its block.

    The scales take the shape of the values, and not the other way round: devices may split a matrix within a block.
    """
    rows, columns = block
    return values * jnp.repeat(jnp.repeat(scales, rows, axis=-2), columns, axis=-1)


def _reciprocal(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """1 / x, and 0 for a block of zeros."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)
