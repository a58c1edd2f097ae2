"""Tensors of files as arrays on the mesh: read once by all processes together, and never whole on a host.

Each process reads the rows that fall to its devices when a tensor is split by rows over all of them: contiguous ranges
of the file, whatever the mesh. The devices then trade rows for the parts that they keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from sft_jax.errors import UserError
from sft_jax.hf.reader import TensorReader, chunks
from sft_jax.typing import Array


class Made(Protocol):
    """How a weight is kept, where not as it is: hashable, and a function of one layer."""

    def __call__(self, weight: Array, /) -> dict[str, Array]:
        """The arrays by name of a weight, or of one layer of it."""
        ...


@dataclass(frozen=True)
class Recipe:
    """What becomes of a tensor; hashable, so that tensors with the same one share a program."""

    num_rows: int  # of the tensor in the file
    transposed: bool
    added_rows: int  # of the token table, that start at the mean of the others
    made: Made | None  # None: kept as it is
    arrays: tuple[tuple[str, jax.ShapeDtypeStruct], ...]  # what is kept, with shardings
    stack: tuple[int, ...]  # leading dimensions that tensors are stacked along; empty: there is one

    def parts(self, rows: Array) -> dict[str, Array]:
        """What is kept of a tensor that was read by rows."""
        weight = rows[: self.num_rows]
        if self.added_rows:
            mean = jnp.mean(weight.astype(jnp.float32), axis=0, keepdims=True).astype(weight.dtype)
            weight = jnp.concatenate([weight, jnp.repeat(mean, self.added_rows, axis=0)])
        weight = weight.T if self.transposed else weight
        if self.made is not None:
            return self.made(weight)
        ((name, kept),) = self.arrays
        return {name: weight.astype(kept.dtype)}


def place(reader: TensorReader, names: Iterable[str], recipe: Recipe) -> dict[str, Array]:
    """The tensors ``names``, in the order of the stack, as the arrays of a recipe."""
    arrays = dict(recipe.arrays)
    mesh = _mesh(arrays)
    start, store = _programs(recipe)
    kept = start() if recipe.stack else {}
    for number, name in enumerate(names):
        rows = _by_rows(reader, name, mesh)
        kept = store(kept, rows, _index(number, recipe.stack)) if recipe.stack else store(rows)
        jax.block_until_ready(kept)  # so that no more than one tensor is on its way
    return kept


@lru_cache(maxsize=256)
def _programs(recipe: Recipe) -> tuple[Callable[[], dict[str, Array]], Callable[..., dict[str, Array]]]:
    """What makes empty stacks, and what stores a tensor in them."""
    arrays = dict(recipe.arrays)
    shardings: Any = {name: leaf.sharding for name, leaf in arrays.items()}

    def start() -> dict[str, Array]:
        return {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in arrays.items()}

    def store(kept: dict[str, Array], rows: Array, index: tuple[Array, ...]) -> dict[str, Array]:
        return {name: _stored_at(kept[name], part, index) for name, part in recipe.parts(rows).items()}

    if recipe.stack:
        return jax.jit(start, out_shardings=shardings), jax.jit(store, donate_argnums=0, out_shardings=shardings)
    return start, jax.jit(recipe.parts, out_shardings=shardings)


def _index(number: int, stack: tuple[int, ...]) -> tuple[np.int32, ...]:
    return tuple(np.int32(i) for i in np.unravel_index(number, stack))


def _stored_at(stack: Array, part: Array, index: tuple[Array, ...]) -> Array:
    start = (*index, *[np.int32(0)] * part.ndim)
    return lax.dynamic_update_slice(stack, part.reshape((1,) * len(index) + part.shape), start)


def _by_rows(reader: TensorReader, name: str, mesh: Mesh) -> Array:
    """A tensor split by rows over all devices, filled up with zeros until they divide it."""
    num_rows, *rest = reader.shape(name)
    each = -(-num_rows // mesh.size)
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shape = (each * mesh.size, *rest)
    parts = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        first = index[0].start or 0  # type: ignore[index]
        parts.append(_on_device(reader, name, first, min(first + each, num_rows), each, device))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _on_device(reader: TensorReader, name: str, first: int, last: int, size: int, device: Any) -> Array:
    """The rows ``first … last`` of a tensor, and zeros up to ``size``, on one device."""
    rest, dtype = reader.shape(name)[1:], reader.dtype(name)
    buffer = None
    for start, rows in chunks(reader, name, first, last):
        rows = _narrow(rows)
        _check_finite(reader, name, rows)
        part = jax.device_put(rows, device)
        if len(rows) == size:  # all of it at once
            return part
        buffer = _zeros((size, *rest), part.dtype, device) if buffer is None else buffer
        buffer = _write(buffer, part, np.int32(start - first))
        buffer.block_until_ready()
    # Devices beyond the last row of the file have none.
    return _zeros((size, *rest), _narrow(np.empty(0, dtype)).dtype, device) if buffer is None else buffer


def _check_finite(reader: TensorReader, name: str, rows: np.ndarray) -> None:
    """By the bits of the exponent, which are all ones where a number is not finite.

    Raises:
        UserError: such a weight, which would make every loss so; the data would be blamed for it.
    """
    bits = np.dtype(f"u{rows.itemsize}")
    exponent = {2: 0x7C00 if rows.dtype == np.float16 else 0x7F80, 4: 0x7F800000}[rows.itemsize]
    magnitude = np.bitwise_and(rows.view(bits), bits.type(np.iinfo(bits).max >> 1))
    if magnitude.size and magnitude.max() >= exponent:
        raise UserError(
            f"{reader.folder}: tensor {name} has weights that are not finite (NaN or infinite); the checkpoint is "
            "damaged"
        )


def _narrow(rows: np.ndarray) -> np.ndarray:
    """jax has no float64 here; what float32 cannot hold becomes infinite."""
    with np.errstate(over="ignore"):
        return rows.astype(np.float32) if rows.dtype == np.float64 else rows


def _zeros(shape: tuple[int, ...], dtype: Any, device: Any) -> Array:
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=SingleDeviceSharding(device))()


@partial(jax.jit, donate_argnums=0)
def _write(buffer: Array, rows: Array, at: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(buffer, rows, at, 0)


def _mesh(arrays: Mapping[str, jax.ShapeDtypeStruct]) -> Mesh:
    sharding: Any = next(iter(arrays.values())).sharding
    return sharding.mesh
