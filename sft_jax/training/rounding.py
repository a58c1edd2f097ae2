"""Stochastic rounding from float32 to bfloat16, and the random bits for it.

bfloat16 has 8 bits of precision: a change of less than 0.2 to 0.4 % of a number is lost when the sum is rounded to the
nearest. A weight under a small learning rate would never move, and a second moment that decays by 0.1 % a step would
never fall. Rounded up or down at random, with the nearer neighbour the likelier one, the sum is right on average.

The bits are a hash of the element's place in the array and of a key. Threefry would do, at some hundred operations an
element and, where its loop is not unrolled, with its counters and bits written to memory; XLA's own generator (rbg)
writes them always and makes others for another mesh. The hash takes about twenty operations that are fused into the
update which needs them, each device makes those of its own elements, and they are the same for every mesh.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sft_jax.tree import Params
from sft_jax.typing import Array, Float


def stochastic_round(x: Float[Array, "..."], key: Array) -> Float[Array, "..."]:
    """``x`` in bfloat16: one of its two neighbours, the lower or the upper so often that the mean is ``x``.

    The 16 bits that bfloat16 drops are a number from 0 to 2¹⁶ - 1: adding a random one of that range carries into the
    bits that stay with just the right probability, for either sign and for denormals too (Gupta et al. 2015). What
    bfloat16 can express comes out as it is; infinities and NaN do too. Beyond its largest number is infinity.
    """
    return round_with(x, random_words(key, x.shape))


def round_with(x: Float[Array, "..."], words: Array) -> Float[Array, "..."]:
    """:func:`stochastic_round` with the low 16 bits of given random words (uint32)."""
    raised = lax.bitcast_convert_type(x, jnp.uint32) + (words & jnp.uint32(0xFFFF))
    kept = lax.bitcast_convert_type((raised >> jnp.uint32(16)).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isnan(x), jnp.bfloat16(jnp.nan), kept)


def random_words(key: Array, shape: tuple[int, ...]) -> Array:
    """A uint32 for each element of ``shape``, from its place and the key; not for cryptography.

    The place within the last two dimensions is hashed with one half of the key, and the result, moved on by the place
    within the others, with the other half: 2³² elements a layer, any number of layers.
    """
    *stack, rows, columns = (1, 1, *shape)[-max(2, len(shape)) :]
    assert rows * columns <= 2**32, shape
    ahead, behind = jax.random.bits(key, (2,), jnp.uint32)
    place = _count([*stack, rows, columns], first=len(stack))
    outer = _count([*stack, rows, columns], last=len(stack))
    words = _mix(_mix(place ^ ahead) + outer * jnp.uint32(0x9E3779B9) + behind)
    return words.reshape(shape)


def leaf_key(key: Array, path: Any) -> Array:
    """A key for the leaf at a ``jax.tree_util`` path."""
    return jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))


def apply_updates(params: Params, updates: Params, key: Array | None) -> Params:
    """``params + updates`` in float32, rounded stochastically to each weight's dtype where that is bfloat16.

    Args:
        key: another one for each step; not needed where all weights are float32.
    """

    def add(path: Any, weight: Array, update: Array) -> Array:
        moved = weight.astype(jnp.float32) + update
        if weight.dtype == jnp.float32:
            return moved
        assert weight.dtype == jnp.bfloat16, (path, weight.dtype)
        assert key is not None, "weights in bfloat16 need a key to be rounded"
        return stochastic_round(moved, leaf_key(key, path))

    return jax.tree_util.tree_map_with_path(add, params, updates)


def _count(shape: list[int], first: int = 0, last: int | None = None) -> Array:
    """The place of each element within the dimensions ``first`` to ``last``, uint32, as it is in memory."""
    place = jnp.zeros(shape, jnp.uint32)
    for dim in range(first, len(shape) if last is None else last):
        stride = math.prod(shape[dim + 1 : last])
        place += lax.broadcasted_iota(jnp.uint32, tuple(shape), dim) * jnp.uint32(stride % 2**32)
    return place


def _mix(x: Array) -> Array:
    """A permutation of 32-bit words in which every bit of the result depends on every bit given (Wellons 2018)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))
