"""Products of one input with several weights, each with an optional LoRA adapter, and their gradients.

The gradients are a custom VJP for three reasons. Transposes apply to thin operands: ``uᵀ·dy`` and ``(gᵀ·x)ᵀ`` have R
columns, where automatic differentiation transposes the wide operand. Weights that share an input (q, k and v; gate and
up) share one product with their ``A``. Gradients are summed in float32, whatever the compute dtype. The residuals are
the input, ``x·A`` if it was computed, and the weights as stored, without a copy in another dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sft_jax.models.quantized import Matrix, QuantizedMatrix, in_dtype
from sft_jax.models.remat import ADAPTER, checkpoint_name
from sft_jax.models.symbolic import instantiate, values_and_perturbed
from sft_jax.typing import Array, Float


class Adapter(NamedTuple):
    """The matrices of a LoRA adapter, ``x·a·b`` before scaling."""

    a: Float[Array, "in R"]
    b: Float[Array, "R out"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class _NeedsGrad:
    """Which inputs need a gradient."""

    x: bool
    weights: tuple[bool, ...]
    adapters: bool


def project(
    x: Float[Array, "*B in"],
    weights: Sequence[Matrix | None],
    adapters: Sequence[Adapter | None],
    scales: Sequence[float],
    layer: Float[Array, ""],
    merged: bool = False,
) -> list[Float[Array, "*B out"]]:
    """Computes ``x·weight + scale · (x·a)·b`` for each weight ``[in, out]``, in the dtype of ``x``.

    If a weight is None, computes the adapter's term only; with dropout, its input differs from that of the weight.
    The gradient of a weight has the weight's dtype, and is computed only if needed. The backward pass dequantizes
    quantized weights again, because saving the dequantized weights would hold those of all layers in memory.

    Args:
        layer: the index of the decoder layer of the weights. Their dtype conversion depends on it, see ``_times``.
        merged: compute ``x·(weight + scale · a·b)``. In each pass, one ``a·b`` replaces a product as long as ``x`` and
            its addition to the result, which is cheaper for more than a few hundred tokens. Only for products that are
            exact in float32; otherwise a small ``a·b`` would be lost in the rounding of the weight.
    """

    @jax.custom_vjp
    def run(x: Array, weights: Any, adapters: Any, layer: Array) -> list[Array]:
        return _forward(x, weights, adapters, scales, layer, merged)[0]

    def forward(*primals: Any) -> tuple[list[Array], Any]:
        (x, weights, adapters, layer), perturbed = values_and_perturbed(primals)
        weights_need_grad = tuple(any(jax.tree.leaves(weight)) for weight in perturbed[1])
        needs_grad = _NeedsGrad(perturbed[0], weights_need_grad, any(jax.tree.leaves(perturbed[2])))
        out, x_a = _forward(x, weights, adapters, scales, layer, merged)
        return out, (x, weights, adapters, layer, x_a, needs_grad)

    def backward(residuals: Any, d_out: Any) -> tuple[Any, Any, Any, None]:
        x, weights, adapters, layer, x_a, needs_grad = residuals
        return *_backward(x, weights, adapters, x_a, needs_grad, d_out, scales, layer, merged), None

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(x, list(weights), list(adapters), layer)


def _forward(
    x: Array, weights: Any, adapters: Any, scales: Sequence[float], layer: Array, merged: bool
) -> tuple[list[Array], list[Array | None]]:
    """Returns the products, and ``scale · x·a`` of each adapter; None for merged adapters."""
    if merged:
        sums = _merged(weights, adapters, scales, x.dtype)
        return [_times(x, one, layer) for one in sums], [None] * len(weights)
    out: list[Any] = [0 if weight is None else _times(x, weight, layer) for weight in weights]
    x_a: list[Array | None] = [None] * len(weights)
    for i, scaled in _scaled_x_a(x, adapters, scales, layer):
        x_a[i], out[i] = scaled, out[i] + _times(scaled, adapters[i].b, layer)
    return out, x_a


def _scaled_x_a(x: Array, adapters: Any, scales: Sequence[float], layer: Array) -> Iterator[tuple[int, Array]]:
    """Yields the index of each adapter and its ``scale · x·a``; one product computes all."""
    present = [i for i, adapter in enumerate(adapters) if adapter is not None]
    if present:
        shared = checkpoint_name(_times(x, jnp.concatenate([adapters[i].a for i in present], axis=1), layer), ADAPTER)
        at = 0
        for i in present:
            rank = adapters[i].a.shape[1]
            yield i, shared[..., at : at + rank] * jnp.asarray(scales[i], x.dtype)
            at += rank


def _merged(weights: Any, adapters: Any, scales: Sequence[float], dtype: Any) -> list[Array]:
    """Returns ``weight + scale · a·b`` for each weight."""
    matrices = [in_dtype(weight, dtype) for weight in weights]
    return [
        matrix if adapter is None else matrix + jnp.dot(jnp.asarray(scale, dtype) * adapter.a, adapter.b)
        for matrix, adapter, scale in zip(matrices, adapters, scales, strict=True)
    ]


def _backward(
    x: Array,
    weights: Any,
    adapters: Any,
    x_a: Any,
    needs_grad: _NeedsGrad,
    d_out: Any,
    scales: Sequence[float],
    layer: Array,
    merged: bool,
) -> tuple[Array | None, list[Array | None], list[Adapter | None]]:
    d_out = [instantiate(dy) for dy in d_out]
    d_weights = [
        _outer(x, dy).astype(weight.dtype) if needed else None
        for weight, dy, needed in zip(weights, d_out, needs_grad.weights, strict=True)
    ]
    sums = _merged(weights, adapters, scales, x.dtype) if merged else weights
    present_weights = [(weight, dy) for weight, dy in zip(sums, d_out, strict=True) if weight is not None]
    d_x: Any = sum(_times(dy, weight, layer, transposed=True) for weight, dy in present_weights)
    d_adapters: list[Adapter | None] = [None] * len(weights)
    present = [i for i, adapter in enumerate(adapters) if adapter is not None]
    if present:
        d_x_a = [
            _times(d_out[i], adapters[i].b, layer, transposed=True) * jnp.asarray(scales[i], x.dtype) for i in present
        ]
        shared = jnp.concatenate(d_x_a, axis=-1)
        if merged:
            x_a = dict(_scaled_x_a(x, adapters, scales, layer))
        else:
            d_x += _times(shared, jnp.concatenate([adapters[i].a for i in present], axis=1), layer, transposed=True)
        if needs_grad.adapters:
            # The barrier keeps the transpose on the thin result; otherwise XLA would transpose the wide x.
            d_a = lax.optimization_barrier(_outer(shared, x)).T
            at = 0
            for i in present:
                rank = adapters[i].a.shape[1]
                d_a_i, d_b_i = d_a[:, at : at + rank], _outer(x_a[i], d_out[i])
                d_adapters[i] = Adapter(d_a_i.astype(adapters[i].a.dtype), d_b_i.astype(adapters[i].b.dtype))
                at += rank
    if needs_grad.x and needs_grad.adapters and present:
        # Compute all gradients that read the input before d_x is used, so that the input can be freed.
        d_x, d_adapters = lax.optimization_barrier((d_x, d_adapters))
    return (d_x if needs_grad.x else None), d_weights, d_adapters


def _times(x: Array, weight: Matrix, layer: Array, transposed: bool = False) -> Array:
    weight = in_layer_dtype(weight, x.dtype, layer)
    dims = (((x.ndim - 1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(x, weight, dims)


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


def _outer(x: Float[Array, "*B m"], y: Float[Array, "*B n"]) -> Float[Array, "m n"]:
    """Returns ``Σ x ⊗ y`` over all positions in float32."""
    positions = tuple(range(x.ndim - 1))
    return lax.dot_general(x, y, ((positions, positions), ((), ())), preferred_element_type=jnp.float32)
