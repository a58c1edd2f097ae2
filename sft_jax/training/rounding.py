"""Stochastic rounding from float32 to bfloat16, and the random bits for it.

bfloat16 has 8 bits of precision: rounding to nearest loses a change of less than 0.2 to 0.4 % of a number. With a small
learning rate a weight would never move, and a second moment that decays by 0.1 % per step would never fall. Stochastic
rounding picks the nearer neighbor with the higher probability, so the sum is right on average.

The bits are a hash of the element's index in the array and a key. Threefry takes some hundred operations per element
and, if its loop is not unrolled, writes counters and bits to memory. XLA's generator (rbg) always writes its bits to
memory, and they depend on the mesh. The hash takes about twenty operations, which fuse into the update. Each device
computes the bits of its own elements, and the bits are the same for every mesh.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sft_jax.errors import UserError
from sft_jax.tree import Params
from sft_jax.typing import Array, Float


def stochastic_round(x: Float[Array, "..."], key: Array) -> Float[Array, "..."]:
    """Rounds ``x`` to one of its two bfloat16 neighbors at random, so that the expected value is ``x``.

    The 16 bits that bfloat16 drops are a number from 0 to 2¹⁶ - 1. Adding a random number of that range carries into
    the remaining bits with the right probability, for both signs and for denormals (Gupta et al. 2015). bfloat16
    values, infinities and NaN do not change. The upper neighbor of the largest bfloat16 is infinity.
    """
    return round_with(x, random_words(key, x.shape))


def round_with(x: Float[Array, "..."], words: Array) -> Float[Array, "..."]:
    """Rounds as :func:`stochastic_round`, with the low 16 bits of random uint32 ``words``."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) + (words & jnp.uint32(0xFFFF))
    rounded = lax.bitcast_convert_type((bits >> jnp.uint32(16)).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isnan(x), jnp.bfloat16(jnp.nan), rounded)


def round_for_file(x: Array | np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Rounds a tensor to the dtype of its file: float32 to bfloat16 stochastically, everything else to nearest.

    A fully fine-tuned weight is its bfloat16 base and a change that is often smaller than half a step of bfloat16.
    Rounding to nearest would take most of these changes back. The result is the same in every process and each time.

    Args:
        name: of the tensor; tensors of different names are rounded independently.
    """
    if dtype != jnp.bfloat16 or x.dtype != jnp.float32:
        return convert(np.asarray(x), dtype, name)
    return np.asarray(_round_for_file(np.asarray(x), np.uint32(zlib.crc32(name.encode()))))


def convert(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Rounds a tensor to another dtype, each number to the nearest.

    Raises:
        UserError: a number is too large for float16.
    """
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        rounded = x.astype(dtype)
    if dtype == np.float16 and not np.array_equal(np.isfinite(rounded), np.isfinite(x)):
        raise UserError(f"{name}: has numbers beyond 65504, the largest of float16; use --dtype bfloat16")
    return rounded


def converted_dtype(wanted: np.dtype | None, dtype: np.dtype) -> np.dtype:
    """The dtype that a tensor of a file is written in: integers and booleans stay what they are."""
    is_float = dtype == jnp.bfloat16 or np.issubdtype(dtype, np.floating)
    return dtype if wanted is None or not is_float else wanted


@jax.jit
def _round_for_file(x: Array, number: Array) -> Array:
    return stochastic_round(x, jax.random.fold_in(jax.random.key(0), number))


def random_words(key: Array, shape: tuple[int, ...]) -> Array:
    """Returns a random uint32 for each element of ``shape``, a hash of its index and the key; not cryptographic.

    Hashes the index within the last two dimensions with one half of the key, then adds the index within the other
    dimensions and hashes with the other half: up to 2³² elements per layer, any number of layers.
    """
    *stack, rows, columns = (1, 1, *shape)[-max(2, len(shape)) :]
    assert rows * columns <= 2**32, shape
    first_key, second_key = jax.random.bits(key, (2,), jnp.uint32)
    index = _flat_index([*stack, rows, columns], first=len(stack))
    outer = _flat_index([*stack, rows, columns], last=len(stack))
    words = _mix(_mix(index ^ first_key) + outer * jnp.uint32(0x9E3779B9) + second_key)
    return words.reshape(shape)


def leaf_key(key: Array, path: Any) -> Array:
    """Returns the key of the leaf at a ``jax.tree_util`` path."""
    return jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))


def apply_updates(params: Params, updates: Params, key: Array | None) -> Params:
    """Computes ``params + updates`` in float32; rounds bfloat16 weights stochastically.

    Args:
        key: a different key for each step; None if all weights are float32.
    """

    def add(path: Any, weight: Array, update: Array) -> Array:
        updated = weight.astype(jnp.float32) + update
        if weight.dtype == jnp.float32:
            return updated
        assert weight.dtype == jnp.bfloat16, (path, weight.dtype)
        assert key is not None, "rounding bfloat16 weights needs a key"
        return stochastic_round(updated, leaf_key(key, path))

    return jax.tree_util.tree_map_with_path(add, params, updates)


def _flat_index(shape: list[int], first: int = 0, last: int | None = None) -> Array:
    """Returns the row-major uint32 index of each element within the dimensions ``first`` to ``last``."""
    index = jnp.zeros(shape, jnp.uint32)
    for dim in range(first, len(shape) if last is None else last):
        stride = math.prod(shape[dim + 1 : last])
        index += lax.broadcasted_iota(jnp.uint32, tuple(shape), dim) * jnp.uint32(stride % 2**32)
    return index


def _mix(x: Array) -> Array:
    """A permutation of 32-bit words where every output bit depends on every input bit (Wellons 2018)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))
