"""Digests of what a checkpoint holds, compared when it is read. Nothing else sees a bit that was flipped on a disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sft_jax.typing import Array

_SEEDS = (0x243F6A88, 0x85A308D3)  # digits of pi


def array_digests(arrays: Mapping[str, Array]) -> dict[str, str]:
    """Computes a digest of 64 bits of each array where it lies. It does not depend on shardings or processes.

    The digest is the sum of a hash of each value and its index, modulo 2⁶⁴ as two words. The hash is a bijection of the
    bits of a value of up to 32 bits, so a single changed value always changes the digest.
    """
    names, words = list(arrays), jax.device_get(_sums(list(arrays.values())))
    return {name: "".join(f"{int(word):08x}" for word in both) for name, both in zip(names, words, strict=True)}


@jax.jit
def _sums(arrays: Sequence[Array]) -> list[tuple[Array, ...]]:
    return [_sums_of(array) for array in arrays]


def _sums_of(array: Array) -> tuple[Array, ...]:
    width = array.dtype.itemsize * 8
    if array.dtype == jnp.bool:
        bits = array.astype(jnp.uint32)
    else:
        bits = lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    index, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        index += lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return tuple(jnp.sum(_mixed(bits ^ _mixed(index ^ jnp.uint32(seed))), dtype=jnp.uint32) for seed in _SEEDS)


def _mixed(x: Array) -> Array:
    """The finalizer of MurmurHash3 (Appleby 2011), a bijection."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))


def named(tree: Any, prefix: str) -> dict[str, Array]:
    """Returns the leaves of a tree by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf for path, leaf in leaves}


def text_digest(value: Any) -> str:
    """Returns the digest of a value as JSON."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
