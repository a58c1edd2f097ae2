"""Modules of the decoder: Linear with an optional adapter, RMSNorm, Embedding.

Attribute names follow transformers. Equal layers are stacked: their parameters have leading dimensions, and linear
weights are ``[*stack, in, out]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sft_jax.models.architecture import Norm
from sft_jax.models.context import Context
from sft_jax.models.projection import Dims, Product, project
from sft_jax.models.quantized import Matrix, Weight, embedding_lookup, gather_matrix, matrix_of
from sft_jax.models.remat import MEAN_SQUARE, checkpoint_name
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Bool, Float, Int


class Initializer:
    """Initializes the parameters of a model, all float32."""

    def __init__(self, key: Array, stddev: float):
        self._rngs = nnx.Rngs(key)
        self._stddev = stddev

    def normal(self, shape: tuple[int, ...], axes: tuple[str, ...], stddev: float | None = None) -> nnx.Param:
        stddev = self._stddev if stddev is None else stddev
        return nnx.Param(stddev * jax.random.normal(self._rngs(), shape, jnp.float32), axes=axes)

    def constant(self, value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)

    def buffer(self, value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> Buffer:
        return Buffer(jnp.full(shape, value, jnp.float32), axes=axes)

    def repeat(self, value: Float[Array, "*A"], stack: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        """Gives each element of a stack the same values."""
        return nnx.Param(jnp.broadcast_to(value.astype(jnp.float32), (*stack, *value.shape)), axes=axes)


class Buffer(nnx.Param):
    """A parameter that is never trained, and stays in float32."""


class AdapterParam(nnx.Param):
    """A parameter of an adapter, trained in float32."""


class Variant(Protocol):
    """An adapter method with its hyperparameters; see :mod:`sft_jax.adapters`."""

    def apply(self, x: Float[Array, "*B in"], layers: Sequence[Linear], context: Context) -> list[Array]:
        """Returns the outputs of adapted layers with the same input, without biases."""
        ...

    def tensor_names(self) -> Mapping[str, str]:
        """Returns the parameters and their PEFT names within a module."""
        ...


class Projection(nnx.Module):
    """A weight ``[*stack, in, out]``, stored as ``[out, in]`` in files.

    Attributes:
        axes: the logical axes of inputs and outputs.
        stack_axes: the logical axes of the last dimensions of the stack, such as that of experts.
        parts: the number of matrices that are concatenated along the outputs, and may be stored apart.
        share: the fraction of tokens that the weight multiplies; less than 1 for an expert.
        is_dense: whether :func:`sft_jax.models.projection.project` multiplies it.
    """

    can_be_quantized = True
    is_dense = False
    stack_axes: tuple[str, ...] = ()

    def __init__(
        self, in_dim: int, out_dim: int, axes: tuple[str, str], make: Initializer, stack: tuple[int, ...] = ()
    ):
        self.axes = axes
        self.weight: Weight = make.normal((*stack, in_dim, out_dim), (*self.stack_axes, *axes))
        self.share = 1.0
        self.parts = 1

    def stored_matrix(self) -> Matrix:
        """Returns the weight as it is stored, sharded and maybe quantized."""
        return matrix_of(self.weight)

    def matrix(self, context: Context) -> Matrix:
        """Returns the weight, gathered unless the context is weight-stationary."""
        return (matrix_of if context.weight_stationary else gather_matrix)(self.weight)


class Linear(Projection):
    """``y = x · weight + bias``, plus an adapter if one is attached.

    Attributes:
        in_heads: the number of heads of inputs ``[*B, N, H]``; None for inputs ``[*B, in]``.
        out_heads: likewise of the outputs.
        has_outliers: see :class:`sft_jax.models.projection.Product`.
    """

    is_dense = True
    in_heads: int | None = None
    out_heads: int | None = None
    has_outliers = False

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        axes: tuple[str, str],
        make: Initializer,
        stack: tuple[int, ...] = (),
        use_bias: bool = False,
    ):
        super().__init__(in_dim, out_dim, axes, make, stack)
        self.bias: nnx.Param | None = nnx.data(make.constant(0.0, (*stack, out_dim), axes[1:]) if use_bias else None)
        self.variant: Variant | None = None

    def __call__(self, x: Float[Array, "*B in"], context: Context) -> Float[Array, "*B out"]:
        """Computes in the dtype of ``x``."""
        return linear(x, [self], context)[0]

    def attach(self, variant: Variant, **parameters: AdapterParam) -> None:
        """Attaches an adapter."""
        self.variant = variant
        for name, parameter in parameters.items():
            setattr(self, name, parameter)

    @property
    def in_dims(self) -> Dims:
        """The last dimensions of the input."""
        return _by_heads(self.weight.shape[-2], self.in_heads)

    @property
    def out_dims(self) -> Dims:
        """The last dimensions of the output."""
        return _by_heads(self.weight.shape[-1], self.out_heads)

    def parameter(self, name: str) -> Array:
        """Returns a parameter of the adapter."""
        return getattr(self, name)[...]


def linear(x: Float[Array, "*B in"], layers: Sequence[Linear], context: Context) -> list[Array]:
    """Applies several layers to one input; one product computes ``x·A`` of all their adapters."""
    variant = next((layer.variant for layer in layers if layer.variant is not None), None)
    if variant is not None:
        outs = variant.apply(x, layers, context)
    else:
        no_adapters, matrices = [None] * len(layers), [layer.matrix(context) for layer in layers]
        outs = project(x, matrices, no_adapters, context.layer, product_of(layers, compute=context.compute))
    return [
        out if layer.bias is None else out + broadcast_like(layer.bias[...].reshape(layer.out_dims), out)
        for out, layer in zip(outs, layers, strict=True)
    ]


def product_of(layers: Sequence[Linear], scale: float = 0.0, **how: Any) -> Product:
    """Returns the product of layers with the same input, whose adapters have one scale."""
    first, outputs = layers[0], tuple(layer.out_dims for layer in layers)
    embed = first.axes.index("embed") if "embed" in first.axes else None
    scales = (scale,) * len(layers)
    return Product(first.in_dims, outputs, scales, embed=embed, has_outliers=first.has_outliers, **how)


def _by_heads(size: int, num_heads: int | None) -> Dims:
    return (size,) if num_heads is None else (num_heads, size // num_heads)


def without_gradient(x: Float[Array, "B T D"], positions: Bool[Array, "B T"] | None) -> Float[Array, "B T D"]:
    """Returns ``x``, which gets no gradient at these positions; None for no position."""
    return x if positions is None else jnp.where(positions[..., None], lax.stop_gradient(x), x)


def broadcast_like(vector: Float[Array, "*D"], x: Float[Array, "*B *D"]) -> Float[Array, "*B *D"]:
    """Broadcasts an array of the last dimensions to the shape and dtype of ``x``; sums its gradient in float32."""
    return jnp.broadcast_to(vector.astype(jnp.float32), x.shape).astype(x.dtype)


def make_norm(dim: int, norm: Norm, make: Initializer, stack: tuple[int, ...] = ()) -> RMSNorm | LayerNorm:
    """Returns the module of a norm."""
    return (LayerNorm if norm.centered else RMSNorm)(dim, norm, make, stack)


class LayerNorm(nnx.Module):
    """Layer norm (Ba et al. 2016), computed in float32 and rounded once; weight and bias where they exist."""

    def __init__(self, dim: int, norm: Norm, make: Initializer, stack: tuple[int, ...] = ()):
        self.norm = norm
        weight = make.constant(1.0 - norm.offset, (*stack, dim), ("norm",)) if norm.has_weight else None
        self.weight: nnx.Param | None = nnx.data(weight)
        self.bias: nnx.Param | None = nnx.data(make.constant(0.0, (*stack, dim), ("norm",)) if norm.has_bias else None)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.norm.eps)
        if self.weight is not None:
            wide = wide * (self.norm.offset + self.weight[...].astype(jnp.float32))
        if self.bias is not None:
            wide = wide + self.bias[...].astype(jnp.float32)
        return wide.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), statistics in float32."""

    def __init__(self, dim: int, norm: Norm, make: Initializer, stack: tuple[int, ...] = ()):
        self.norm = norm
        weight = make.constant(1.0 - norm.offset, (*stack, dim), ("norm",)) if norm.has_weight else None
        self.weight: nnx.Param | None = nnx.data(weight)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        mean_square = checkpoint_name(jnp.mean(wide * wide, axis=-1), MEAN_SQUARE)
        wide = wide * lax.rsqrt(mean_square + self.norm.eps)[..., None]
        if self.weight is None:
            return wide.astype(x.dtype)
        if self.norm.offset or self.norm.rounded_once:  # as in Gemma: rounded once, at the end
            return (wide * (self.norm.offset + self.weight[...].astype(jnp.float32))).astype(x.dtype)
        return wide.astype(x.dtype) * broadcast_like(self.weight[...], x)


class Embedding(nnx.Module):
    """Looks up token embeddings ``[V, D]`` and multiplies them by ``scale``."""

    can_be_quantized = True

    def __init__(self, vocab_size: int, dim: int, make: Initializer, scale: float = 1.0):
        self.scale = scale
        self.weight: Weight = make.normal((vocab_size, dim), ("vocab", "embed"))

    def __call__(self, ids: Int[Array, "B T"], dtype: Any, weight_stationary: bool = False) -> Float[Array, "B T D"]:
        # The embeddings stay sharded along D: look up each token's slice of D, then reshard from D to positions, then
        # to sequences. With both in one step, the compiler would all-gather the embeddings.
        ids = constrain(ids, "replica", "unsplit_length")
        x = constrain(embedding_lookup(self.weight, ids, dtype), "replica", "unsplit_length", "embed")
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, dtype)
        if weight_stationary:
            return x
        x = constrain(x, "replica", "length", "embed_fsdp")
        return constrain(x, "batch", "length", "activation")
