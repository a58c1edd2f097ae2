"""Quantised weights in the network: put in place of kernels, read back where they are used, made while loading.

A kernel ``layers.mlp.up_proj.kernel`` gives way to a module of the same name with the arrays of its format, ``codes``
and the rest, as leaves. They are frozen, keep their own dtypes, and are split over devices as the kernel would be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sft_jax.models.quantize import Format, dequantize, kernel_format, quantize, table_format
from sft_jax.sharding import constrain
from sft_jax.tree import Path
from sft_jax.typing import Array, Float, Int

Index = tuple[slice, ...]


class QuantizedParam(nnx.Param):
    """An array of a quantised weight; keeps its dtype where frozen weights otherwise take the compute dtype."""


class Quantized(nnx.Module):
    """A weight ``[*stack, in, out]`` kept in ``fmt``."""

    codes: QuantizedParam  # and the other arrays of the format

    def __init__(self, fmt: Format, shape: tuple[int, ...], axes: tuple[str, str]):
        self.fmt, self.axes = fmt, axes
        for name, piece in fmt.pieces().items():
            setattr(self, name, QuantizedParam(jnp.zeros(fmt.shape(name, shape), jnp.dtype(piece.dtype)), axes=axes))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.fmt.weight_shape(self.codes.shape)

    def arrays(self) -> dict[str, Array]:
        """The arrays of the format."""
        return {name: getattr(self, name)[...] for name in self.fmt.pieces()}


Weight = nnx.Param | Quantized


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """A quantised matrix as plain data."""

    arrays: dict[str, Array]
    fmt: Format = field(metadata={"static": True})


Matrix = Array | Packed


def matrix_of(weight: Weight) -> Matrix:
    """What a weight of the network holds."""
    return Packed(weight.arrays(), weight.fmt) if isinstance(weight, Quantized) else weight[...]


def gathered_matrix(weight: Weight) -> Matrix:
    """What a weight of a layer holds.

    Where devices hold parts of the model dimension, codes are gathered here, before they become two to eight times as
    many bytes. Other weights are gathered where the compiler finds it best.
    """
    if not isinstance(weight, Quantized):
        return weight[...]
    axes = tuple("activation" if axis == "embed" else axis for axis in weight.axes)
    return Packed({name: constrain(array, *axes) for name, array in weight.arrays().items()}, weight.fmt)


def in_dtype(matrix: Matrix, dtype: Any) -> Float[Array, "*L in out"]:
    """A matrix, ready to compute with."""
    return matrix.astype(dtype) if isinstance(matrix, jax.Array) else dequantize(matrix.arrays, matrix.fmt, dtype)


def rows_of(table: Weight, ids: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """Rows of a table ``[V, D]``; of a quantised one, no others are read back."""
    if not isinstance(table, Quantized):
        return _gathered(table[...], ids).astype(dtype)
    codes, scales = (getattr(table, name)[...].at[ids].get(mode="clip") for name in ("codes", "scales"))
    return (codes.astype(jnp.float32) * scales).astype(dtype)


@jax.custom_vjp
def _gathered(table: Array, ids: Array) -> Array:
    return table.at[ids].get(mode="clip")


def _scattered(kept: tuple[Array, Array], d_rows: Array) -> tuple[Array, None]:
    table, ids = kept
    total = jnp.zeros(table.shape, jnp.float32).at[ids].add(d_rows.astype(jnp.float32), mode="clip")
    return total.astype(table.dtype), None


# A frequent token's gradients are added up in float32, whatever the dtype of the table.
_gathered.defvjp(lambda table, ids: (_gathered(table, ids), (table, ids)), _scattered)


def attach_quantization(model: nnx.Module, method: str, tables: bool = True) -> None:
    """Replace the weights of a network that holds none yet, in place: linear kernels in ``method``.

    Args:
        method: ``nf4`` or ``int8``.
        tables: also the token table and the output head, in int8 either way: each row or column is one token, and
            has a scale of its own.

    Raises:
        UserError: a kernel that the method cannot hold.
    """
    for path, node in list(nnx.iter_graph(model)):
        for name in ("kernel", "embedding"):
            weight = getattr(node, name, None)
            if not isinstance(weight, nnx.Param):
                continue
            shape, axes = weight.shape, weight.get_metadata("axes")
            if path[0] == "layers":
                fmt = kernel_format(method, *shape[-2:])
            elif tables:
                fmt = table_format(shape, axes.index("vocab"))
            else:
                continue
            setattr(node, name, nnx.data(Quantized(fmt, shape, axes)))


@dataclass(frozen=True)
class QuantizedLeaf:
    """A quantised weight that is not there yet: abstract arrays with shardings, and how to make them."""

    fmt: Format
    arrays: dict[str, jax.ShapeDtypeStruct]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, as the network without quantisation has it."""
        return self.fmt.weight_shape(self.arrays["codes"].shape)

    @property
    def size(self) -> int:
        """How many weights."""
        return math.prod(self.shape)

    def make(self, read: Callable[[Index], np.ndarray]) -> dict[str, Array]:
        """The arrays in place, from a function that reads any part of the weight.

        Each device's part is read and quantised by itself, a layer at a time, so that no more than that exists
        unquantised. A part that cuts through a block is read with the whole block, so that what becomes of a weight
        does not depend on how it is split.
        """
        made: dict[tuple, list[dict[str, np.ndarray]]] = {}

        def part(name: str, index: Index) -> np.ndarray:
            *stack, rows, columns = index
            spans = [
                _span(of, size, grain, whole)
                for of, size, grain, whole in zip(
                    (rows, columns), self.shape[-2:], self.fmt.pieces()[name].grain, self.fmt.whole(), strict=True
                )
            ]
            read_index = tuple(outer for outer, _ in spans)
            layers = [(slice(i, i + 1),) for i in range(*stack[0].indices(self.shape[0]))] if stack else [()]
            key = tuple((one.start, one.stop) for one in (*layers[0], *layers[-1], *read_index))
            if key not in made:
                made[key] = [self._quantize(read((*layer, *read_index))) for layer in layers]
            parts = [arrays[name][tuple(inner for _, inner in spans)] for arrays in made[key]]
            return np.stack(parts) if stack else parts[0]

        return {
            name: jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index, name=name: part(name, index))  # type: ignore[arg-type]
            for name, leaf in self.arrays.items()
        }

    def _quantize(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        weight = weight.reshape(weight.shape[-2:])
        if weight.dtype == np.float64:
            weight = weight.astype(np.float32)
        return jax.tree.map(np.asarray, quantize(jnp.asarray(weight), self.fmt))


def _span(part: slice, size: int, grain: int, whole: int) -> tuple[slice, slice]:
    """What to read of a dimension of a weight for ``part`` of an array of a given grain, and where that then lies.

    >>> _span(slice(3, 5), 512, 16, 64)  # 48 to 80 of the weight lie in two blocks of 64
    (slice(0, 128, None), slice(3, 5, None))
    """
    start, stop, _ = part.indices(size // grain)
    first = start * grain // whole * whole
    last = -(-stop * grain // whole) * whole
    return slice(first, last), slice(start - first // grain, stop - first // grain)


def quantized_leaves(model: nnx.Module, abstract: dict[Path, jax.ShapeDtypeStruct]) -> dict[Path, QuantizedLeaf]:
    """The quantised weights of a network, by the path that the unquantised one would have."""
    found = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Quantized):
            path = tuple(map(str, path))
            found[path] = QuantizedLeaf(node.fmt, {name: abstract[(*path, name)] for name in node.fmt.pieces()})
    return found
