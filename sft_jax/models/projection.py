"""One input times several weights, each with an optional LoRA adapter, and the gradients of that.

The gradients are written out for three reasons. Transposes fall on thin operands: ``uᵀ·dy`` and ``(gᵀ·x)ᵀ`` have R
columns where automatic differentiation transposes the wide one. Kernels that share an input (q, k and v; gate and up)
share the products with their ``A``. And gradients are added up in float32 whatever the compute dtype. For the backward
pass are kept the input, ``x·A`` where it was computed, and the weights as they are: no copy in another dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from sft_jax.models.quantized import Matrix, Packed, in_dtype
from sft_jax.models.remat import ADAPTER, keep
from sft_jax.typing import Array, Float


class Adapter(NamedTuple):
    """``x·a·b``, to be scaled."""

    a: Float[Array, "in R"]
    b: Float[Array, "R out"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Wanted:
    """Which gradients are asked for."""

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
    """``x·weight + scale · (x·a)·b`` for each weight ``[in, out]``, computed in the dtype of ``x``.

    Without a weight, only what its adapter adds: one whose input is not the weight's, because of dropout.
    The gradient of a weight has the weight's dtype, and is computed only if it is asked for. Quantised weights are read
    back once more for the backward pass: keeping what was read would keep the weights of all layers.

    Args:
        layer: the number of the layer that the weights are of, to which their conversion to another dtype is tied.
        merged: compute ``x·(weight + scale · a·b)``: on each way one ``a·b`` instead of a product as long as ``x`` and
            its addition to the result, which is less where tokens are more than a few hundred. For products that are
            exact in float32; elsewhere a small ``a·b`` would be lost in the rounding of the weight.
    """

    @jax.custom_vjp
    def run(x: Array, weights: Any, adapters: Any, layer: Array) -> list[Array]:
        return _forward(x, weights, adapters, scales, layer, merged)[0]

    def forward(*primals: Any) -> tuple[list[Array], Any]:
        is_primal = lambda node: hasattr(node, "perturbed")  # noqa: E731
        x, weights, adapters, layer = jax.tree.map(lambda leaf: leaf.value, primals, is_leaf=is_primal)
        asked = jax.tree.map(lambda leaf: leaf.perturbed, primals, is_leaf=is_primal)
        of_weights = tuple(any(jax.tree.leaves(of_weight)) for of_weight in asked[1])
        wanted = _Wanted(asked[0], of_weights, any(jax.tree.leaves(asked[2])))
        out, low = _forward(x, weights, adapters, scales, layer, merged)
        return out, (x, weights, adapters, layer, low, wanted)

    def backward(kept: Any, d_out: Any) -> tuple[Any, Any, Any, None]:
        x, weights, adapters, layer, low, wanted = kept
        return *_backward(x, weights, adapters, low, wanted, d_out, scales, layer, merged), None

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(x, list(weights), list(adapters), layer)


def _forward(
    x: Array, weights: Any, adapters: Any, scales: Sequence[float], layer: Array, merged: bool
) -> tuple[list[Array], list[Array | None]]:
    """Products, and ``scale · x·a`` of each adapter whose part was computed apart."""
    if merged:
        sums = _merged(weights, adapters, scales, x.dtype)
        return [_times(x, one, layer) for one in sums], [None] * len(weights)
    out: list[Any] = [0 if weight is None else _times(x, weight, layer) for weight in weights]
    low: list[Array | None] = [None] * len(weights)
    for i, scaled in _low(x, adapters, scales, layer):
        low[i], out[i] = scaled, out[i] + _times(scaled, adapters[i].b, layer)
    return out, low


def _low(x: Array, adapters: Any, scales: Sequence[float], layer: Array) -> Iterator[tuple[int, Array]]:
    """The number of each adapter, and ``scale · x·a``, from one product."""
    present = [i for i, adapter in enumerate(adapters) if adapter is not None]
    if present:
        shared = keep(_times(x, jnp.concatenate([adapters[i].a for i in present], axis=1), layer), ADAPTER)
        at = 0
        for i in present:
            rank = adapters[i].a.shape[1]
            yield i, shared[..., at : at + rank] * jnp.asarray(scales[i], x.dtype)
            at += rank


def _merged(weights: Any, adapters: Any, scales: Sequence[float], dtype: Any) -> list[Array]:
    """``weight + scale · a·b`` of each."""
    matrices = [in_dtype(weight, dtype) for weight in weights]
    return [
        matrix if adapter is None else matrix + jnp.dot(jnp.asarray(scale, dtype) * adapter.a, adapter.b)
        for matrix, adapter, scale in zip(matrices, adapters, scales, strict=True)
    ]


def _backward(
    x: Array,
    weights: Any,
    adapters: Any,
    low: Any,
    wanted: _Wanted,
    d_out: Any,
    scales: Sequence[float],
    layer: Array,
    merged: bool,
) -> tuple[Array | None, list[Array | None], list[Adapter | None]]:
    d_out = [_instantiated(dy) for dy in d_out]
    d_weights = [
        _outer(x, dy).astype(weight.dtype) if asked else None
        for weight, dy, asked in zip(weights, d_out, wanted.weights, strict=True)
    ]
    sums = _merged(weights, adapters, scales, x.dtype) if merged else weights
    given = [(one, dy) for one, dy in zip(sums, d_out, strict=True) if one is not None]
    d_x: Any = sum(_times(dy, weight, layer, transposed=True) for weight, dy in given)
    d_adapters: list[Adapter | None] = [None] * len(weights)
    present = [i for i, adapter in enumerate(adapters) if adapter is not None]
    if present:
        d_low = [
            _times(d_out[i], adapters[i].b, layer, transposed=True) * jnp.asarray(scales[i], x.dtype) for i in present
        ]
        shared = jnp.concatenate(d_low, axis=-1)
        if merged:
            low = dict(_low(x, adapters, scales, layer))
        else:
            d_x += _times(shared, jnp.concatenate([adapters[i].a for i in present], axis=1), layer, transposed=True)
        if wanted.adapters:
            # The barrier keeps the thin result as it is computed: else the transpose would move to the wide x.
            d_a = lax.optimization_barrier(_outer(shared, x)).T
            at = 0
            for i in present:
                rank = adapters[i].a.shape[1]
                d_a_i, d_b_i = d_a[:, at : at + rank], _outer(low[i], d_out[i])
                d_adapters[i] = Adapter(d_a_i.astype(adapters[i].a.dtype), d_b_i.astype(adapters[i].b.dtype))
                at += rank
    if wanted.x and wanted.adapters and present:
        # What reads the input comes first, so that the input is free when its gradient is used.
        d_x, d_adapters = lax.optimization_barrier((d_x, d_adapters))
    return (d_x if wanted.x else None), d_weights, d_adapters


def _times(x: Array, weight: Matrix, layer: Array, transposed: bool = False) -> Array:
    if isinstance(weight, Packed):
        weight = in_dtype(weight, x.dtype)
    elif weight.dtype != x.dtype:
        # Tied to the layer, because the compiler would move the conversion of a stack of layers out of the loop over
        # them and hold a second copy of the model: 9,596 instead of 8,956 MiB a chip for Llama-3-8B on 16 TPU v5e. Its
        # number is known everywhere before the layer begins; tied to x, devices would first exchange an element of x
        # for each matrix, and none could be gathered ahead.
        one = 1.0 + 0.0 * layer
        weight = (weight.astype(jnp.float32) * one).astype(x.dtype)
    dims = (((x.ndim - 1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(x, weight, dims)


def _outer(x: Float[Array, "*B m"], y: Float[Array, "*B n"]) -> Float[Array, "m n"]:
    """``Σ x ⊗ y`` over all positions, float32."""
    positions = tuple(range(x.ndim - 1))
    return lax.dot_general(x, y, ((positions, positions), ((), ())), preferred_element_type=jnp.float32)


def _instantiated(cotangent: Any) -> Array:
    """The gradient of an output; zeros where nothing depends on it."""
    if isinstance(cotangent, SymbolicZero):
        aval: Any = cotangent.aval
        return jnp.zeros(aval.shape, aval.dtype)
    return cotangent
