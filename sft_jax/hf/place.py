"""Reads tensors from files into sharded arrays; each byte is read by one process, and no host holds a whole tensor.

A tensor is first read sharded by rows over all devices, so that each process reads contiguous ranges of the file for
any mesh. A jitted program then reshards it to its final sharding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from sft_jax.cpu_compiler import cpu_options
from sft_jax.errors import UserError
from sft_jax.files.digests import Words, words_of
from sft_jax.hf.reader import Reader, chunks
from sft_jax.typing import Array


class Made(Protocol):
    """Quantizes a weight of one layer; hashable."""

    def __call__(self, weight: Array, /) -> dict[str, Array]:
        """Returns the arrays of the quantized weight by name."""
        ...


@dataclass(frozen=True)
class Recipe:
    """How to convert a tensor of a file into arrays; hashable, so that equal recipes share a compiled program.

    A tensor is a matrix, or a stack of matrices that :attr:`made` quantizes one by one.
    """

    num_rows: int  # rows of the tensor in the file
    transposed: bool
    added_rows: int  # rows for added tokens, initialized to the mean of the existing ones
    made: Made | None  # quantization; None: only cast to the dtype
    arrays: tuple[tuple[str, jax.ShapeDtypeStruct], ...]  # the resulting arrays, with shardings
    stack: tuple[int, ...]  # leading dimensions along which tensors are stacked; empty for a single tensor
    parts: int = 1  # tensors that are concatenated along the last dimension of an element of the stack

    def convert(self, rows: Array) -> dict[str, Array]:
        """Converts one tensor."""
        weight = rows[: self.num_rows]
        if self.added_rows:
            mean = jnp.mean(weight.astype(jnp.float32), axis=0, keepdims=True).astype(weight.dtype)
            weight = jnp.concatenate([weight, jnp.repeat(mean, self.added_rows, axis=0)])
        weight = weight.swapaxes(-1, -2) if self.transposed else weight
        if self.made is not None:
            return self.made(weight) if weight.ndim == 2 else lax.map(self.made, weight)
        ((name, array),) = self.arrays
        return {name: weight.astype(array.dtype)}


def place(
    reader: Reader,
    names: Iterable[str],
    recipe: Recipe,
    digests: dict[str, Words] | None = None,
    progress: Callable[[int], object] = lambda bytes: None,
) -> dict[str, Array]:
    """Reads the tensors ``names``, in the order of stack and parts, into the arrays of a recipe.

    Args:
        digests: receives the digest of each tensor as it is in the files.
        progress: called with the bytes of each tensor.
    """
    arrays = dict(recipe.arrays)
    mesh = _mesh(arrays)
    start, store = _programs(recipe, digests is not None)
    result = start() if recipe.stack else {}
    for number, name in enumerate(names):
        rows = _read_sharded(reader, name, mesh)
        element, part = divmod(number, recipe.parts)
        at = (result, rows, _index(element, recipe.stack), np.int32(part)) if recipe.stack else (rows,)
        result, words = store(*at)
        if digests is not None:
            digests[name] = words
        jax.block_until_ready(result)  # at most one tensor in flight
        progress(num_bytes(reader, name))
    return result


def num_bytes(reader: Reader, name: str) -> int:
    """The size of a tensor as it is read."""
    return math.prod(reader.shape(name)) * reader.dtype(name).itemsize


@lru_cache(maxsize=256)
def _programs(
    recipe: Recipe, with_digests: bool
) -> tuple[Callable[[], dict[str, Array]], Callable[..., tuple[dict[str, Array], Words]]]:
    """Returns a function that creates empty stacks, and one that converts a tensor and stores it in them.

    The second also returns the digest of the tensor, or nothing without ``with_digests``.
    """
    arrays = dict(recipe.arrays)
    shardings: Any = {name: leaf.sharding for name, leaf in arrays.items()}

    def digest(rows: Array) -> Words:
        return words_of(rows[: recipe.num_rows]) if with_digests else ()

    def convert(rows: Array) -> tuple[dict[str, Array], Words]:
        return recipe.convert(rows), digest(rows)

    def start() -> dict[str, Array]:
        return {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in arrays.items()}

    def store(
        stacks: dict[str, Array], rows: Array, index: tuple[Array, ...], part: Array
    ) -> tuple[dict[str, Array], Words]:
        stored = {name: _update(stacks[name], one, index, part) for name, one in recipe.convert(rows).items()}
        return stored, digest(rows)

    mesh = _mesh(arrays)
    jit: Any = partial(jax.jit, compiler_options=cpu_options(mesh.devices.flat[0]))
    out_shardings = (shardings, NamedSharding(mesh, PartitionSpec()))
    if recipe.stack:
        return jit(start, out_shardings=shardings), jit(store, donate_argnums=0, out_shardings=out_shardings)
    return start, jit(convert, out_shardings=out_shardings)


def _index(number: int, stack: tuple[int, ...]) -> tuple[np.int32, ...]:
    return tuple(np.int32(i) for i in np.unravel_index(number, stack))


def _update(stack: Array, tensor: Array, index: tuple[Array, ...], part: Array) -> Array:
    if stack.ndim == len(index):  # of scalars
        return stack.at[index].set(tensor[0])
    tensor = tensor.reshape((1,) * len(index) + stack.shape[len(index) : -1] + (-1,))
    start = (*index, *[np.int32(0)] * (tensor.ndim - len(index) - 1), part * np.int32(tensor.shape[-1]))
    return lax.dynamic_update_slice(stack, tensor, start)


def _read_sharded(reader: Reader, name: str, mesh: Mesh) -> Array:
    """Reads a tensor sharded by rows over all devices, padded with zero rows to a multiple of their number."""
    num_rows, *rest = reader.shape(name) or (1,)  # a scalar is one row
    each = -(-num_rows // mesh.size)
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shape = (each * mesh.size, *rest)
    shards = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        first = index[0].start or 0  # type: ignore[index]
        shards.append(_read_to_device(reader, name, first, min(first + each, num_rows), each, device))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _read_to_device(reader: Reader, name: str, first: int, last: int, size: int, device: Any) -> Array:
    """Reads the rows ``first … last`` of a tensor to a device, padded with zero rows to ``size``."""
    rest, dtype = reader.shape(name)[1:], reader.dtype(name)
    buffer = None
    for start, rows in chunks(reader, name, first, last):
        rows = _narrow(rows)
        check_finite(reader, name, rows)
        chunk = jax.device_put(rows, device)
        if len(rows) == size:  # a single chunk
            return chunk
        buffer = _zeros((size, *rest), chunk.dtype, device) if buffer is None else buffer
        buffer = _write(buffer, chunk, np.int32(start - first))
        buffer.block_until_ready()
    # Only padding on devices beyond the last row.
    return _zeros((size, *rest), _narrow(np.empty(0, dtype)).dtype, device) if buffer is None else buffer


def check_finite(reader: Reader, name: str, rows: np.ndarray) -> None:
    """Checks the exponent bits, which are all ones in NaN and infinity.

    Raises:
        UserError: a weight is not finite; otherwise every loss would be NaN, and the data would be blamed.
    """
    bits = np.dtype(f"u{rows.itemsize}")
    of_kind = {2: 0x7C00 if rows.dtype == np.float16 else 0x7F80, 4: 0x7F800000, 8: 0x7FF0000000000000}
    exponent = of_kind[rows.itemsize]
    magnitude = np.bitwise_and(rows.view(bits), bits.type(np.iinfo(bits).max >> 1))
    if magnitude.size and magnitude.max() >= exponent:
        raise UserError(
            f"{reader.folder}: tensor {name} has weights that are not finite (NaN or infinite); the checkpoint is "
            "corrupt"
        )


def _narrow(rows: np.ndarray) -> np.ndarray:
    """Casts float64 to float32, since x64 is disabled in JAX; values out of range become infinite."""
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
