"""Digests of arrays and files, compared when they are read. Nothing else sees a bit that was flipped on a disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sft_jax.typing import Array

Words = tuple[Array, ...]

_CHUNK = 1 << 20  # bytes of a file that are read at a time
_SEEDS = (0x243F6A88, 0x85A308D3)  # digits of pi


def array_digests(arrays: Mapping[str, Array]) -> dict[str, str]:
    """Computes a digest of 64 bits of each array where it lies. It does not depend on shardings or processes.

    The digest is the sum of a hash of each value and its index, modulo 2⁶⁴ as two words. The hash is a bijection of the
    bits of a value of up to 32 bits, so a single changed value always changes the digest.
    """
    return texts(dict(zip(arrays, _sums(list(arrays.values())), strict=True)))


@jax.jit
def _sums(arrays: Sequence[Array]) -> list[Words]:
    return [words_of(array) for array in arrays]


def texts(words: Mapping[str, Words]) -> dict[str, str]:
    """Returns digests as hexadecimal digits; waits for the devices."""
    return {name: "".join(f"{int(one):08x}" for one in both) for name, both in jax.device_get(dict(words)).items()}


def words_of_rows(rows: np.ndarray, start: int, before: Words = ()) -> Words:
    """Adds rows of an array, from the row ``start`` on, to the digest of the rows before them."""
    first = start * math.prod(rows.shape[1:]) % 2**32
    words = _words_from(jnp.asarray(rows), np.uint32(first))
    return tuple(a + b for a, b in zip(before, words, strict=True)) if before else words


def words_of(array: Array, first: Array | int = 0) -> Words:
    """Returns the digest of an array as two words, inside or outside of a jitted function.

    Args:
        first: index of the first value, if the array continues another one.
    """
    width = array.dtype.itemsize * 8
    if array.dtype == jnp.bool:
        bits = array.astype(jnp.uint32)
    else:
        bits = lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    index, stride = jnp.full(array.shape, first, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        index += lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return tuple(jnp.sum(_mixed(bits ^ _mixed(index ^ jnp.uint32(seed))), dtype=jnp.uint32) for seed in _SEEDS)


_words_from = jax.jit(words_of)


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


def file_digest(path: Path) -> str:
    """Returns the digest of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def folder_digests(folder: Path, names: Collection[str] | None = None) -> dict[str, str]:
    """Returns the digests of the files in a folder by name; empty if there is no such folder.

    Args:
        names: of the files; by default all.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {file.name: file_digest(file) for file in files if file.is_file() and (names is None or file.name in names)}


def first_difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """Returns the first name whose digests differ, or that only one of the two has; None if they are equal."""
    names = sorted(expected.keys() | found.keys())
    return next((name for name in names if expected.get(name) != found.get(name)), None)
