"""Quantization of weights to 4 and 8 bits: pure functions that quantize and dequantize a matrix.

Quantization is absmax scaling: the values of a block are divided by their largest magnitude, and each quotient is
replaced by the index, its *code*, of the nearest level. ``nf4`` (QLoRA, Dettmers et al. 2023, section 3) has 16 levels
at quantiles of a normal distribution, in blocks of 64 inputs of one output channel. ``int8`` has 255 uniform levels,
``fp8`` those of E4M3.

A block of four values in nf4::

    values            0.30 -1.50 0.75 0.05       absmax 1.50
    quotients         0.20 -1.00 0.50 0.03
    nearest level     0.161 -1.0 0.441 0.0       codes 9 0 12 7
    packed            9 | 12 << 4 = 201, 0 | 7 << 4 = 112
    dequantized       0.24 -1.50 0.66 0.00

A byte packs one code from each half of a block, not two neighbors. Halves that are multiples of a tile are unpacked in
place; interleaved codes would need float32 copies of the whole matrix (2,259 instead of 1,600 MiB per chip for
Llama-3-8B on 16 TPU v5e).

A 32-bit scale per 64 values would add half a bit to each value, so nf4 quantizes the scales to 8 bits ("double
quantization"): 256 scales share a float32 offset and step. These scales are neighbors along the output dimension. So
every array has an input and an output dimension like the matrix, and the same sharding. nf4 takes 0.516 bytes per
weight in total, int8 takes 1.031 with one scale per 128 inputs.

A dimension that 64, 128 or 256 does not divide uses its largest divisor below that as the block size, without padding.
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

_EIGHT_BIT = {"int8": "int8", "fp8": "float8_e4m3fn"}  # dtypes of the codes

# Quantiles of a standard normal distribution, eight at and below zero and eight above it, scaled to [-1, 1]
# (QLoRA, appendix E). Zero is a level, so zeros are exact.
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
class ArraySpec:
    """One array of a quantized matrix; each element belongs to ``grain`` elements of the matrix."""

    dtype: str
    grain: tuple[int, int]  # inputs, outputs


@dataclass(frozen=True)
class Format:
    """The quantized format of a matrix ``[in, out]``.

    ``block`` inputs and outputs share a scale. ``scale_block`` nf4 scales along the outputs share an offset and step.
    Where ``is_factor``, products multiply the codes themselves; see :mod:`sft_jax.models.eight_bit`.
    """

    method: str  # nf4 | int8 | fp8
    block: tuple[int, int]
    scale_block: int = 1
    is_factor: bool = False

    def array_specs(self) -> dict[str, ArraySpec]:
        """Returns the specs of the arrays by name."""
        if self.method in _EIGHT_BIT:
            codes = ArraySpec(_EIGHT_BIT[self.method], (1, 1))
            return {"codes": codes, "scales": ArraySpec("float32", self.block)}
        per_scale_block = (self.block[0], self.scale_block)
        return {
            "codes": ArraySpec("uint8", (2, 1)),
            "scales": ArraySpec("uint8", self.block),
            "scale_step": ArraySpec("float32", per_scale_block),
            "scale_offset": ArraySpec("float32", per_scale_block),
        }

    def whole(self) -> tuple[int, int]:
        """Returns the shape of the smallest part of a matrix that can be quantized by itself."""
        return self.block[0], max(self.block[1], self.scale_block)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of an array of a matrix, or stack of matrices, of ``shape``."""
        *stack, in_dim, out_dim = shape
        rows, columns = self.array_specs()[name].grain
        return (*stack, in_dim // rows, out_dim // columns)

    def weight_shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the matrix, or stack of matrices, with codes of this shape."""
        *stack, rows, columns = codes
        per_row, per_column = self.array_specs()["codes"].grain
        return (*stack, rows * per_row, columns * per_column)


def linear_format(method: str, in_dim: int, out_dim: int) -> Format:
    """Returns the format of a linear layer's weight ``[in, out]``.

    Raises:
        UserError: the number of inputs is odd in nf4, where two codes share a byte.
    """
    if method == "int8":
        return Format("int8", (largest_divisor(in_dim, INT8_BLOCK), 1))
    if in_dim % 2:
        raise UserError(
            f"model.quantization: nf4 packs pairs of inputs, and a layer has {in_dim}, an odd number; use int8"
        )
    return Format("nf4", (2 * largest_divisor(in_dim // 2, NF4_BLOCK // 2), 1), largest_divisor(out_dim, SCALE_BLOCK))


def factor_format(method: str, in_dim: int, out_dim: int) -> Format:
    """Returns the format of a weight whose codes are multiplied: scales vary along the outputs only.

    ``int8`` has one scale per output channel, ``fp8`` one for all of ``out_dim``.
    """
    return Format(method, (in_dim, 1 if method == "int8" else out_dim), is_factor=True)


def vocab_format(shape: tuple[int, ...], vocab_dim: int) -> Format:
    """Returns int8 with one scale per vocabulary entry, for embeddings ``[V, D]`` or ``lm_head`` ``[D, V]``."""
    return Format("int8", (1, shape[1]) if vocab_dim == 0 else (shape[0], 1))


def largest_divisor(size: int, most: int) -> int:
    """Returns the largest divisor of ``size`` up to ``most``."""
    return next(n for n in range(min(size, most), 0, -1) if size % n == 0)


def largest_value(dtype: jnp.dtype | type) -> float:
    """Returns the largest finite value of an integer or floating dtype."""
    return float((jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).max)


def to_codes(quotients: Float[Array, "*S"], dtype: jnp.dtype | type) -> Array:
    """Rounds values of at most the largest of ``dtype`` to it, half to even."""
    return (jnp.round(quotients) if jnp.issubdtype(dtype, jnp.integer) else quotients).astype(dtype)


@partial(jax.jit, static_argnames="fmt")
def quantize(weight: Float[Array, "in out"], fmt: Format) -> Arrays:
    """Quantizes a matrix to the arrays of ``fmt``; both dimensions are multiples of ``fmt.whole()``."""
    weight = weight.astype(jnp.float32)
    return _quantize_nf4(weight, fmt) if fmt.method == "nf4" else _quantize_eight_bit(weight, fmt)


def dequantize(arrays: Arrays, fmt: Format, dtype: jnp.dtype | type) -> Float[Array, "*L in out"]:
    """Dequantizes a matrix, or stack of matrices, in float32 and rounds once to ``dtype``."""
    if fmt.method in _EIGHT_BIT:
        return _scaled(arrays["codes"].astype(jnp.float32), arrays["scales"], fmt.block).astype(dtype)
    packed = _halved(arrays["codes"], fmt)  # [*L, in/block, 1, block/2, out]
    codes = (packed >> jnp.asarray([0, 4], jnp.uint8).reshape(2, 1, 1)) & jnp.uint8(15)
    values = _nf4_level(codes) * _scales(arrays, fmt)[..., None, None, :]
    return values.astype(dtype).reshape(fmt.weight_shape(arrays["codes"].shape))


def _quantize_eight_bit(weight: Float[Array, "in out"], fmt: Format) -> Arrays:
    """``codes = w / scales``, rounded half to even; ``scales = absmax / largest``, 127 or 448."""
    dtype = jnp.dtype(_EIGHT_BIT[fmt.method])
    largest = largest_value(dtype)
    scales = _absmax(weight, fmt.block) / largest
    quotients = jnp.clip(_scaled(weight, reciprocal(scales), fmt.block), -largest, largest)
    return {"codes": to_codes(quotients, dtype), "scales": scales}


def _quantize_nf4(weight: Float[Array, "in out"], fmt: Format) -> Arrays:
    """Computes codes with the exact scales, as in the reference, and then quantizes the scales to 8 bits."""
    absmax = _absmax(weight, fmt.block)
    quotients = _scaled(weight, reciprocal(absmax), fmt.block)
    codes = jnp.zeros(weight.shape, jnp.uint8)
    for low, high in pairwise(NF4_LEVELS):
        codes += (quotients > jnp.float32((low + high) / 2)).astype(jnp.uint8)
    grouped = absmax.reshape(absmax.shape[0], -1, fmt.scale_block)
    offset = grouped.min(axis=-1)
    step = (grouped.max(axis=-1) - offset) / 255
    numbers = jnp.round((grouped - offset[..., None]) * reciprocal(step)[..., None])
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
    """Returns levels by four selections, one per bit: about as fast as a table on a CPU, without a gather.

    An optimization barrier ties the levels to the codes. XLA for GPUs hoists plain constants out of a scan over layers:
    sixteen arrays of the shape of each matrix would stay in memory.
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
    """Multiplies each value by the scale of its block.

    Repeats scales instead of reshaping values, because sharding may split a matrix within a block.
    """
    rows, columns = block
    return values * jnp.repeat(jnp.repeat(scales, rows, axis=-2), columns, axis=-1)


def reciprocal(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Returns 1 / x, and 0 for a block of zeros."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)
