"""Quantised weights in the network: put in place of others, dequantised where they are used, made while loading.

A weight ``layers.0.mlp.up_proj.weight`` gives way to a module of the same name with the arrays of its format, ``codes``
and the rest, as leaves. They are frozen, keep their own dtypes, and are split over devices as the weight would be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sft_jax.models.quantize import Format, dequantize, linear_format, quantize, vocab_format
from sft_jax.sharding import constrain
from sft_jax.tree import Path
from sft_jax.typing import Array, Float, Int


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


def attach_quantization(model: nnx.Module, method: str, embeddings: bool = True) -> None:
    """Replace the weights of a network that holds none yet, in place: linear weights in ``method``.

    Args:
        method: ``nf4`` or ``int8``.
        embeddings: also the embeddings and ``lm_head``, in int8 either way: each row or column is one token, and
            has a scale of its own.

    Raises:
        UserError: a weight that the method cannot hold.
    """
    for path, node in list(nnx.iter_graph(model)):
        weight = getattr(node, "weight", None)
        if not isinstance(weight, nnx.Param) or not getattr(node, "can_be_quantised", False):
            continue
        shape, axes = weight.shape, weight.get_metadata("axes")
        if path[0] == "layers":
            fmt = linear_format(method, *shape[-2:])
        elif embeddings:
            fmt = vocab_format(shape, axes.index("vocab"))
        else:
            continue
        node.weight = nnx.data(Quantized(fmt, shape, axes))


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

    @property
    def made(self) -> Callable[[Array], dict[str, Array]]:
        """From a matrix, or one of a stack, to its arrays; equal and hashable for equal formats."""
        return Quantizer(self.fmt)


@dataclass(frozen=True)
class Quantizer:
    """:func:`sft_jax.models.quantize.quantize` in one format."""

    fmt: Format

    def __call__(self, weight: Float[Array, "in out"]) -> dict[str, Array]:
        return quantize(weight, self.fmt)


def quantized_leaves(model: nnx.Module, abstract: dict[Path, jax.ShapeDtypeStruct]) -> dict[Path, QuantizedLeaf]:
    """The quantised weights of a network, by the path that the unquantised one would have."""
    found = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Quantized):
            path = tuple(map(str, path))
            found[path] = QuantizedLeaf(node.fmt, {name: abstract[(*path, name)] for name in node.fmt.pieces()})
    return found
