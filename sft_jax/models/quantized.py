"""Quantized weights of the model: quantized during loading, dequantized where they are used.

A module of the same name replaces a weight such as ``layers.0.mlp.up_proj.weight``. Its leaves are the arrays of the
format (``codes``, ``scales``, …). They are frozen, keep their own dtypes, and have the sharding of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sft_jax.models.architecture import EMBEDDINGS
from sft_jax.models.quantize import Format, dequantize, factor_format, linear_format, quantize, vocab_format
from sft_jax.sharding import constrain
from sft_jax.tree import Path
from sft_jax.typing import Array, Float, Int


class QuantizedParam(nnx.Param):
    """An array of a quantized weight; keeps its dtype, while other frozen weights have the compute dtype."""


class Quantized(nnx.Module):
    """A weight ``[*stack, in, out]`` in the quantized format ``fmt``."""

    codes: QuantizedParam  # and the other arrays of the format

    def __init__(self, fmt: Format, shape: tuple[int, ...], axes: tuple[str, str]):
        self.fmt, self.axes = fmt, axes
        for name, spec in fmt.array_specs().items():
            setattr(self, name, QuantizedParam(jnp.zeros(fmt.shape(name, shape), jnp.dtype(spec.dtype)), axes=axes))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight before quantization."""
        return self.fmt.weight_shape(self.codes.shape)

    def arrays(self) -> dict[str, Array]:
        """Returns the arrays of the format."""
        return {name: getattr(self, name)[...] for name in self.fmt.array_specs()}


Weight = nnx.Param | Quantized


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized matrix as plain data."""

    arrays: dict[str, Array]
    fmt: Format = field(metadata={"static": True})


Matrix = Array | QuantizedMatrix


def matrix_of(weight: Weight) -> Matrix:
    """Returns the matrix of a weight."""
    return QuantizedMatrix(weight.arrays(), weight.fmt) if isinstance(weight, Quantized) else weight[...]


def gather_matrix(weight: Weight) -> Matrix:
    """Returns the matrix of a weight, with quantized codes all-gathered along the model dimension.

    Gathering the codes is cheaper than gathering the dequantized weight, which has two to eight times as many bytes.
    The compiler decides where to all-gather other weights.
    """
    if not isinstance(weight, Quantized):
        return weight[...]
    axes = tuple("activation" if axis == "embed" else axis for axis in weight.axes)
    return QuantizedMatrix({name: constrain(array, *axes) for name, array in weight.arrays().items()}, weight.fmt)


def in_dtype(matrix: Matrix, dtype: Any) -> Float[Array, "*L in out"]:
    """Converts a matrix to ``dtype``; dequantizes a quantized one."""
    return matrix.astype(dtype) if isinstance(matrix, jax.Array) else dequantize(matrix.arrays, matrix.fmt, dtype)


def embedding_lookup(table: Weight, ids: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """Looks up rows of the embeddings ``[V, D]``; dequantizes only the rows that it looks up."""
    if not isinstance(table, Quantized):
        return _take(table[...], ids).astype(dtype)
    codes, scales = (getattr(table, name)[...].at[ids].get(mode="clip") for name in ("codes", "scales"))
    return (codes.astype(jnp.float32) * scales).astype(dtype)


@jax.custom_vjp
def _take(table: Array, ids: Array) -> Array:
    return table.at[ids].get(mode="clip")


def _take_backward(residuals: tuple[Array, Array], d_rows: Array) -> tuple[Array, None]:
    table, ids = residuals
    total = jnp.zeros(table.shape, jnp.float32).at[ids].add(d_rows.astype(jnp.float32), mode="clip")
    return total.astype(table.dtype), None


# Sums the gradients of a token in float32, whatever the dtype of the embeddings.
_take.defvjp(lambda table, ids: (_take(table, ids), (table, ids)), _take_backward)


def attach_factors(model: nnx.Module, method: str) -> None:
    """Replaces the weights of an abstract model's decoder layers with codes that products multiply, in place.

    Experts, the embeddings and ``lm_head`` stay as they are.

    Args:
        method: ``int8`` or ``fp8``.
    """
    for path, node in list(nnx.iter_graph(model)):
        weight = getattr(node, "weight", None)
        if isinstance(weight, nnx.Param) and getattr(node, "is_dense", False) and path[0] not in EMBEDDINGS:
            in_dim, out_dim = weight.shape[-2:]
            fmt = factor_format(method, in_dim, out_dim // getattr(node, "parts", 1))
            node.weight = nnx.data(Quantized(fmt, weight.shape, weight.get_metadata("axes")))


def attach_quantization(model: nnx.Module, method: str, embeddings: bool = True) -> None:
    """Replaces the linear weights of an abstract model with quantized weights, in place.

    Args:
        method: ``nf4`` or ``int8``.
        embeddings: also quantize the embeddings and ``lm_head``. All weights with one entry per token are quantized to
            int8 with one scale per token for either method.

    Raises:
        UserError: the method does not support a weight.
    """
    for path, node in list(nnx.iter_graph(model)):
        weight = getattr(node, "weight", None)
        if not isinstance(weight, nnx.Param) or not getattr(node, "can_be_quantized", False):
            continue
        shape, axes = weight.shape, weight.get_metadata("axes")
        if path[0] in EMBEDDINGS and not embeddings:
            continue
        if "vocab" in axes:
            fmt = vocab_format(shape, axes.index("vocab"))
        else:
            fmt = linear_format(method, shape[-2], shape[-1] // getattr(node, "parts", 1))
        node.weight = nnx.data(Quantized(fmt, shape, axes))


@dataclass(frozen=True)
class QuantizedLeaf:
    """An abstract quantized weight: abstract arrays with shardings, and the function that quantizes it."""

    fmt: Format
    arrays: dict[str, jax.ShapeDtypeStruct]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight before quantization."""
        return self.fmt.weight_shape(self.arrays["codes"].shape)

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def made(self) -> Callable[[Array], dict[str, Array]]:
        """The function that quantizes one matrix to its arrays; equal and hashable for equal formats."""
        return Quantizer(self.fmt)


@dataclass(frozen=True)
class Quantizer:
    """:func:`sft_jax.models.quantize.quantize` in one format."""

    fmt: Format

    def __call__(self, weight: Float[Array, "in out"]) -> dict[str, Array]:
        return quantize(weight, self.fmt)


def quantized_leaves(model: nnx.Module, abstract: dict[Path, jax.ShapeDtypeStruct]) -> dict[Path, QuantizedLeaf]:
    """Returns the quantized weights of a model by the path of the weight that they replace."""
    leaves = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Quantized):
            path = tuple(map(str, path))
            leaves[path] = QuantizedLeaf(node.fmt, {name: abstract[(*path, name)] for name in node.fmt.array_specs()})
    return leaves
