"""The parts that decoder layers are made of: Linear with an optional adapter, RMSNorm, Embedding.

Attribute names are Hugging Face's. Layers of one kind are stacked: their parameters carry leading dimensions, and
linear weights are ``[*stack, in, out]``.
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
from sft_jax.models.projection import project
from sft_jax.models.quantized import Matrix, Weight, gathered_matrix, matrix_of, rows_of
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float, Int


class Initializer:
    """Makes the parameters of a network: normal weights, constant norms, zero biases, all float32."""

    def __init__(self, key: Array, stddev: float):
        self._rngs = nnx.Rngs(key)
        self._stddev = stddev

    def normal(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        return nnx.Param(self._stddev * jax.random.normal(self._rngs(), shape, jnp.float32), axes=axes)

    def constant(self, value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


class AdapterParam(nnx.Param):
    """A parameter of an adapter, trained in float32."""


class Variant(Protocol):
    """A kind of adapter, with its settings; see :mod:`sft_jax.adapters`."""

    def apply(self, x: Float[Array, "*B in"], layers: Sequence[Linear], context: Context) -> list[Array]:
        """What adapted layers make of one input, without their biases."""
        ...

    def tensor_names(self) -> Mapping[str, str]:
        """The parameters, and what PEFT calls each within its module."""
        ...


class Projection(nnx.Module):
    """A weight ``[*stack, in, out]``, which files have as ``[out, in]``.

    Attributes:
        axes: the logical axes of inputs and outputs.
        share: of all tokens that it multiplies; less than 1 for an expert.
    """

    can_be_quantised = True

    def __init__(
        self, in_dim: int, out_dim: int, axes: tuple[str, str], make: Initializer, stack: tuple[int, ...] = ()
    ):
        self.axes = axes
        self.weight: Weight = make.normal((*stack, in_dim, out_dim), axes)
        self.share = 1.0

    def matrix(self, context: Context) -> Matrix:
        """Its weight, where the product is computed."""
        return (matrix_of if context.weights_stay else gathered_matrix)(self.weight)


class Linear(Projection):
    """``y = x · weight + bias``, changed by an adapter where one is attached."""

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
        """Computed in the dtype of ``x``."""
        return linear(x, [self], context)[0]

    def attach(self, variant: Variant, **parameters: AdapterParam) -> None:
        """Give it an adapter."""
        self.variant = variant
        for name, parameter in parameters.items():
            setattr(self, name, parameter)

    def parameter(self, name: str) -> Array:
        """Of its adapter."""
        return getattr(self, name)[...]


def linear(x: Float[Array, "*B in"], layers: Sequence[Linear], context: Context) -> list[Array]:
    """Several layers of one input, which share its products with their adapters."""
    variant = next((layer.variant for layer in layers if layer.variant is not None), None)
    if variant is not None:
        outs = variant.apply(x, layers, context)
    else:
        nothing, matrices = [None] * len(layers), [layer.matrix(context) for layer in layers]
        outs = project(x, matrices, nothing, [0.0] * len(layers), context.layer)
    return [
        out if layer.bias is None else out + everywhere(layer.bias[...], out)
        for out, layer in zip(outs, layers, strict=True)
    ]


def everywhere(vector: Float[Array, "D"], x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """A vector at every position, in the dtype of ``x``; in this order its gradient is summed in float32."""
    return jnp.broadcast_to(vector.astype(jnp.float32), x.shape).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), statistics in float32."""

    def __init__(self, dim: int, norm: Norm, make: Initializer, stack: tuple[int, ...] = ()):
        self.norm = norm
        self.weight = make.constant(1.0 - norm.offset, (*stack, dim), ("norm",))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.norm.eps)
        if self.norm.offset:  # as Gemma does it: rounded once, at the end
            return (wide * (self.norm.offset + self.weight[...].astype(jnp.float32))).astype(x.dtype)
        return wide.astype(x.dtype) * everywhere(self.weight[...], x)


class Embedding(nnx.Module):
    """Token embeddings ``[V, D]``, looked up and multiplied by ``scale``."""

    can_be_quantised = True

    def __init__(self, vocab_size: int, dim: int, make: Initializer, scale: float = 1.0):
        self.scale = scale
        self.weight: Weight = make.normal((vocab_size, dim), ("vocab", "embed"))

    def __call__(self, ids: Int[Array, "B T"], dtype: Any, weights_stay: bool = False) -> Float[Array, "B T D"]:
        # The embeddings stay split along D: look up each token's slice of D, then exchange slices of D for positions,
        # then for sequences. Both at once, and the compiler would gather all embeddings on each device.
        ids = constrain(ids, "replica", "whole_length")
        x = constrain(rows_of(self.weight, ids, dtype), "replica", "whole_length", "embed")
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, dtype)
        if weights_stay:
            return x
        x = constrain(x, "replica", "length", "embed_of_slots")
        return constrain(x, "batch", "length", "activation")
