"""Products of one input with several weights, each with an optional LoRA adapter, and their gradients.

The gradients are a custom VJP for three reasons. Transposes apply to thin operands: ``uᵀ·dy`` and ``(gᵀ·x)ᵀ`` have R
columns, where automatic differentiation transposes the wide operand. Weights that share an input (q, k and v; gate and
up) share one product with their ``A``. Gradients are summed in float32, whatever the compute dtype. The residuals are
the input, ``x·A`` if it was computed, and the weights as stored, without a copy in another dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax

from sft_jax.models import eight_bit, joined
from sft_jax.models.eight_bit import EightBit
from sft_jax.models.quantized import Matrix, QuantizedMatrix, in_dtype
from sft_jax.models.remat import ADAPTER, checkpoint_name
from sft_jax.models.symbolic import instantiate, values_and_perturbed
from sft_jax.models.weight_gradient import outer, weight_gradient
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float

Dims = tuple[int, ...]


class Adapter(NamedTuple):
    """The matrices of a LoRA adapter, ``x·a·b`` before scaling."""

    a: Float[Array, "in R"]
    b: Float[Array, "R out"]


@dataclass(frozen=True)
class Product:
    """How a product is computed.

    Attributes:
        inputs: the last dimensions of the input; ``(N, H)`` for an input by heads.
        outputs: those of the output of each weight.
        scales: of the adapter of each weight.
        form: how adapters are added. ``separate``: by products of their own.

            ``merged``: ``x·(weight + scale · a·b)``. In each pass, one ``a·b`` replaces a product as long as ``x`` and
            its addition to the result, which is cheaper for more than a few hundred tokens. Only for products that are
            exact in float32; otherwise a small ``a·b`` would be lost in the rounding of the weight.

            ``joined``: ``[x, scale · x·a]·[weight; b]`` and its transpose, with sums in float32, see
            :mod:`sft_jax.models.joined`. A TPU's matrix unit multiplies over R inputs at a tenth of its rate, and a
            product of its own reads and writes the outputs once more; to join copies the weight. Where the outputs are
            narrower than the input, or the input is by heads, only the gradient is joined: ``[dy, d_x_a]·[weight,
            a]ᵀ``. Only for weights that are not sharded along the heads or channels.
        embed: which dimension of the weights is sharded along the model dimension, 0 or 1; None for neither.
        compute: rounds the factors of products with plain weights, and their gradients, to eight bits; not those of
            adapters.
        has_outliers: whether few inputs are much larger than the others of their row; int8 then rounds the weight and
            the gradient only.
    """

    inputs: Dims
    outputs: tuple[Dims, ...]
    scales: tuple[float, ...]
    form: str = "separate"
    embed: int | None = None
    compute: EightBit | None = None
    has_outliers: bool = False


@jax.tree_util.register_static
@dataclass(frozen=True)
class _NeedsGrad:
    """Which inputs need a gradient."""

    x: bool
    weights: tuple[bool, ...]
    adapters: bool


def project(
    x: Float[Array, "*B *in"],
    weights: Sequence[Matrix | None],
    adapters: Sequence[Adapter | None],
    layer: Float[Array, ""],
    how: Product,
) -> list[Float[Array, "*B *out"]]:
    """Computes ``x·weight + scale · (x·a)·b`` for each weight ``[in, out]``, in the dtype of ``x``.

    If a weight is None, computes the adapter's term only; with dropout, its input differs from that of the weight.
    The gradient of a weight has the weight's dtype, and is computed only if needed. The backward pass dequantizes
    quantized weights again, because saving the dequantized weights would hold those of all layers in memory.

    Args:
        layer: the index of the decoder layer of the weights. Their dtype conversion depends on it, see
            :func:`in_layer_dtype`.
    """

    @jax.custom_vjp
    def run(x: Array, weights: Any, adapters: Any, layer: Array) -> list[Array]:
        return _Pass(how, weights, adapters, layer).forward(x)[0]

    def forward(*primals: Any) -> tuple[list[Array], Any]:
        (x, weights, adapters, layer), perturbed = values_and_perturbed(primals)
        weights_need_grad = tuple(any(jax.tree.leaves(weight)) for weight in perturbed[1])
        needs_grad = _NeedsGrad(perturbed[0], weights_need_grad, any(jax.tree.leaves(perturbed[2])))
        out, x_a = _Pass(how, weights, adapters, layer).forward(x)
        return out, (x, weights, adapters, layer, x_a, needs_grad)

    def backward(residuals: Any, d_out: Any) -> tuple[Any, Any, Any, None]:
        x, weights, adapters, layer, x_a, needs_grad = residuals
        return *_Pass(how, weights, adapters, layer).backward(x, x_a, needs_grad, d_out), None

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(x, list(weights), list(adapters), layer)


@dataclass(frozen=True)
class _Pass:
    """The forward and the backward pass of :func:`project`."""

    how: Product
    weights: Sequence[Any]
    adapters: Sequence[Any]
    layer: Array

    @property
    def present(self) -> list[int]:
        """The indices of the adapters that are there."""
        return [i for i, adapter in enumerate(self.adapters) if adapter is not None]

    @property
    def is_joined(self) -> bool:
        plain = not any(weight is None or is_factor(weight) for weight in self.weights)
        return self.how.form == "joined" and bool(self.present) and plain

    @property
    def is_stacked(self) -> bool:
        """Whether the forward pass is joined too: it copies the input, and not the outputs, which are as wide."""
        how = self.how
        return self.is_joined and len(how.inputs) == 1 and how.inputs[0] <= sum(map(math.prod, how.outputs))

    def forward(self, x: Array) -> tuple[list[Array], dict[int, Array]]:
        """Returns the products, and ``scale · x·a`` by the index of the adapter; of no merged one."""
        if self.how.form == "merged":
            sums = zip(self.merged(x.dtype), self.how.outputs, strict=True)
            return [self.times(x, one, dims) for one, dims in sums], {}
        if self.is_stacked:
            return self.forward_joined(x)
        x_a, outs = self.scaled_x_a(x), list[Any]()
        for i, (weight, dims) in enumerate(zip(self.weights, self.how.outputs, strict=True)):
            out: Any = 0
            if i in self.present:
                out = _product(x_a[i], self.in_dtype(self.adapters[i].b, x.dtype), (x_a[i].shape[-1],), dims)
                if is_factor(weight):
                    # The longer product adds the shorter one, and not the other way round.
                    out = lax.optimization_barrier(out)
            outs.append(out if weight is None else out + self.times(x, weight, dims))
        return outs, x_a

    def forward_joined(self, x: Array) -> tuple[list[Array], dict[int, Array]]:
        """Returns ``[x, x_a]·[weight; b]`` for each weight, and ``x_a``."""
        x_a = self.scaled_x_a(x)
        wide = joined.widen(x, list(x_a.values()))
        return [_product(wide, one, one.shape[:1], one.shape[1:]) for one in self.stacks(x.dtype)[0]], x_a

    def stacks(self, dtype: Any) -> tuple[list[Array], dict[int, Array]]:
        """Returns ``[weight; b]`` for each weight, and each ``b`` by the index of the adapter."""
        bs = {i: self.gathered(self.adapters[i].b, dtype) for i in self.present}
        return joined.stack([self.gathered(weight, dtype) for weight in self.weights], bs, self.how.outputs), bs

    def backward(
        self, x: Array, x_a: dict[int, Array], needs_grad: _NeedsGrad, d_out: Any
    ) -> tuple[Array | None, list[Array | None], list[Adapter | None]]:
        d_out = [instantiate(dy) for dy in d_out]
        d_weights: list[Array | None] = [None] * len(self.weights)
        for i, (weight, dy, dims) in enumerate(zip(self.weights, d_out, self.how.outputs, strict=True)):
            if needs_grad.weights[i]:
                total = weight_gradient(x, dy, len(self.how.inputs), len(dims), self.how.embed, self.how.compute)
                d_weights[i] = total.astype(weight.dtype)
        d_x, d_x_a = self.d_x(d_out)
        d_adapters: list[Adapter | None] = [None] * len(self.weights)
        if self.present and needs_grad.adapters:
            d_adapters = self.adapter_gradients(x, x_a, d_out, d_x_a)
            if needs_grad.x and self.how.form != "joined":
                # Compute all gradients that read the input before d_x is used, so that the input can be freed. Not on
                # TPUs, whose products compute d_x together with what uses it.
                d_x, d_adapters = lax.optimization_barrier((d_x, d_adapters))
        return (d_x if needs_grad.x else None), d_weights, d_adapters

    def adapter_gradients(
        self, x: Array, x_a: dict[int, Array], d_out: Sequence[Array], d_x_a: dict[int, Array]
    ) -> list[Adapter | None]:
        if self.how.form == "merged":
            x_a = self.scaled_x_a(x)
        num = len(self.how.inputs)
        # The barrier keeps the transpose on the thin result; otherwise XLA would transpose the wide x.
        thin = lax.optimization_barrier(outer(jnp.concatenate(list(d_x_a.values()), axis=-1), x, 1, num))
        d_a = thin.reshape(thin.shape[0], -1).T
        gradients: list[Adapter | None] = [None] * len(self.weights)
        at = 0
        for i in self.present:
            a, b = self.adapters[i]
            d_b = outer(x_a[i], d_out[i], 1, len(self.how.outputs[i])).reshape(b.shape)
            gradients[i] = Adapter(d_a[:, at : at + a.shape[1]].astype(a.dtype), d_b.astype(b.dtype))
            at += a.shape[1]
        return gradients

    def d_x(self, d_out: Sequence[Array]) -> tuple[Any, dict[int, Array]]:
        """Returns the gradients of the input and of each ``x·a``."""
        inputs, dtype = self.how.inputs, d_out[0].dtype
        scales = {i: jnp.asarray(self.how.scales[i], dtype) for i in self.present}
        d_x: Any = 0
        if self.is_stacked:
            stacks, bs = self.stacks(dtype)
            for dy, one in zip(d_out, stacks, strict=True):
                d_x += _product(dy, one, one.shape[:1], one.shape[1:], True)
            d_x, d_x_a = joined.narrow(d_x, inputs[0], bs)
            d_x_a = {i: one * scales[i] for i, one in d_x_a.items()}
            return d_x + self.adapters_d_x(d_x_a), d_x_a
        d_x_a = {}
        for i in self.present:
            b = self.in_dtype(self.adapters[i].b, dtype)
            d_x_a[i] = _product(d_out[i], b, b.shape[:1], self.how.outputs[i], True) * scales[i]
        if self.is_joined and len(self.weights) == 1:
            return self.d_x_joined(d_out[0], d_x_a[0]), d_x_a
        weights = self.merged(dtype) if self.how.form == "merged" else self.weights
        for weight, dy, dims in zip(weights, d_out, self.how.outputs, strict=True):
            if weight is not None:
                d_x += self.times(dy, weight, dims, transposed=True)
        if self.present and self.how.form != "merged":
            d_x += self.adapters_d_x(d_x_a)
        return d_x, d_x_a

    def adapters_d_x(self, d_x_a: dict[int, Array]) -> Array:
        """Returns the gradient of the input from those of all ``x·a``."""
        rows = jnp.concatenate(list(d_x_a.values()), axis=-1)
        a = self.in_dtype(jnp.concatenate([self.adapters[i].a for i in d_x_a], axis=1), rows.dtype)
        return _product(rows, a, self.how.inputs, a.shape[1:], True)

    def d_x_joined(self, dy: Array, d_x_a: Array) -> Array:
        """Returns ``[dy, d_x_a]·[weight, a]ᵀ`` of the only weight."""
        weight, a = self.gathered(self.weights[0], dy.dtype), self.gathered(self.adapters[0].a, dy.dtype)
        dy = dy.reshape(*dy.shape[: dy.ndim - len(self.how.outputs[0])], -1)
        wide, both = joined.extend(dy, d_x_a, weight, a, self.how.inputs)
        return _product(wide, both, self.how.inputs, wide.shape[-1:], True)

    def scaled_x_a(self, x: Array) -> dict[int, Array]:
        """Returns ``scale · x·a`` by the index of the adapter; one product computes all."""
        x_a: dict[int, Array] = {}
        if self.present:
            a = self.in_dtype(jnp.concatenate([self.adapters[i].a for i in self.present], axis=1), x.dtype)
            shared = checkpoint_name(_product(x, a, self.how.inputs, a.shape[1:]), ADAPTER)
            at = 0
            for i in self.present:
                rank = self.adapters[i].a.shape[1]
                x_a[i] = shared[..., at : at + rank] * jnp.asarray(self.how.scales[i], x.dtype)
                at += rank
        return x_a

    def merged(self, dtype: Any) -> list[Array]:
        """Returns ``weight + scale · a·b`` for each weight."""
        return [
            in_dtype(weight, dtype)
            if adapter is None
            else in_dtype(weight, dtype) + jnp.dot(jnp.asarray(scale, dtype) * adapter.a, adapter.b)
            for weight, adapter, scale in zip(self.weights, self.adapters, self.how.scales, strict=True)
        ]

    def times(self, x: Array, weight: Matrix, dims: Dims, transposed: bool = False) -> Array:
        """Returns ``x·weight``, with outputs of these dimensions, or ``x·weightᵀ``."""
        inputs = self.how.inputs
        if is_factor(weight) and (transposed or not self.how.has_outliers or weight.fmt.method != "int8"):
            return eight_bit.product(x, weight, inputs, dims, transposed)
        if self.how.compute is not None and not is_factor(weight):
            return eight_bit.rounded_product(
                x, in_dtype(weight, jnp.float32), self.how.compute, inputs, dims, transposed
            )
        return _product(x, self.in_dtype(weight, x.dtype), inputs, dims, transposed)

    def gathered(self, matrix: Matrix, dtype: Any) -> Array:
        """Converts a matrix, and all-gathers it; the compiler would otherwise gather it with what it is joined to."""
        return constrain(self.in_dtype(matrix, dtype), "activation", "activation")

    def in_dtype(self, matrix: Matrix, dtype: Any) -> Array:
        return in_layer_dtype(matrix, dtype, self.layer)


def is_factor(weight: Matrix | None) -> TypeGuard[QuantizedMatrix]:
    """Returns whether products multiply the codes of a weight."""
    return isinstance(weight, QuantizedMatrix) and weight.fmt.is_factor


def _product(x: Array, weight: Array, inputs: Dims, outputs: Dims, transposed: bool = False) -> Array:
    """Returns ``x·weight`` over the last dimensions of ``x``; transposed, over the outputs."""
    num = len(outputs) if transposed else len(inputs)
    weight, first = weight.reshape(*inputs, *outputs), len(inputs) if transposed else 0
    dims = (tuple(range(x.ndim - num, x.ndim)), tuple(range(first, first + num)))
    return lax.dot_general(x, weight, (dims, ((), ())))


def in_layer_dtype(weight: Matrix, dtype: Any, layer: Float[Array, ""]) -> Array:
    """Converts or dequantizes the weight of a decoder layer to ``dtype``, inside the loop over layers."""
    if isinstance(weight, QuantizedMatrix):
        return in_dtype(weight, dtype)
    if weight.dtype != dtype:
        # The conversion depends on the layer index. Otherwise the compiler would hoist it out of the loop over stacked
        # layers and hold a second copy of the model: 9,596 instead of 8,956 MiB per chip for Llama-3-8B on 16 TPU v5e.
        # Every device has the index before the layer starts. With a dependence on x, devices would first exchange an
        # element of x for each matrix, and no matrix could be prefetched.
        one = 1.0 + 0.0 * layer
        weight = (weight.astype(jnp.float32) * one).astype(dtype)
    return weight
