"""Products in eight bits: both factors are rounded to int8 or FP8, multiplied at the higher rate, and scaled.

A factor is divided by its scale, the largest magnitude over the largest value of the format, and rounded. ``int8`` has
one scale per row of the activations and per output channel of the weight (Dettmers et al. 2022). ``fp8`` has one per
matrix, which GPUs apply inside their products: activations and weights in E4M3, gradients of outputs in E5M2
(Micikevicius et al. 2022), scaled by their current values. One row of activations in int8, times one output channel::

    x       0.50 -2.54 1.00      scale 0.02    codes  25 -127  50
    weight  0.30  0.10 -1.27     scale 0.01    codes  30   10 -127
    codes multiplied             25·30 - 127·10 - 50·127 = -6870
    product                      -6870 · 0.02 · 0.01 = -1.374      exactly 0.15 - 0.254 - 1.27 = -1.374

The input of a gated MLP's last layer has outliers, which would leave few codes to the rest of their row: ``int8`` keeps
it as it is, and multiplies it by the weight of the codes.

Sums are int32 or float32. Scales of a weight that multiply its outputs are applied to the product; in the transposed
product, to the other factor before it is rounded, so that one set of codes serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from sft_jax.errors import UserError
from sft_jax.models.quantize import largest_value, reciprocal, to_codes
from sft_jax.models.quantized import QuantizedMatrix
from sft_jax.typing import Array, Float

Dims = tuple[int, ...]


@dataclass(frozen=True)
class EightBit:
    """How factors are rounded.

    Attributes:
        dtype: of activations and weights.
        gradient: dtype of gradients of outputs.
        by_row: whether each row of activations, and of gradients, has its own scale.
    """

    name: str
    dtype: Any
    gradient: Any
    by_row: bool


INT8 = EightBit("int8", jnp.int8, jnp.int8, by_row=True)
FP8 = EightBit("fp8", jnp.float8_e4m3fn, jnp.float8_e5m2, by_row=False)
_INT8_TPUS = ("v5", "v6")  # in their device_kind
_FP8_TPUS = ("v7", "TPU7")
_FP8_CAPABILITY = 8.9  # of CUDA
FORMATS = {one.name: one for one in (INT8, FP8)}


def check_device(name: str, device: Any) -> None:
    """Checks that a device multiplies in a format; a CPU emulates both.

    Raises:
        UserError: it does not; the message names devices that do.
    """
    kind, capability = device.device_kind, getattr(device, "compute_capability", None)
    if name == "int8" and device.platform == "tpu" and not any(one in kind for one in _INT8_TPUS):
        raise UserError(f"model.compute: {kind} multiplies int8 no faster than bfloat16; {' and '.join(_INT8_TPUS)} do")
    if name != "fp8":
        return
    is_old = device.platform == "gpu" and capability is not None and float(capability) < _FP8_CAPABILITY
    if is_old or (device.platform == "tpu" and not any(one in kind for one in _FP8_TPUS)):
        instead = " or int8" if device.platform == "tpu" else ""
        raise UserError(
            f"model.compute: {kind} does not multiply FP8; an H100, H200, B200, L40S, RTX 4090 or TPU v7x does; use "
            f"null{instead}"
        )


def product(
    x: Float[Array, "*B *in"], weight: QuantizedMatrix, inputs: Dims, outputs: Dims, transposed: bool = False
) -> Float[Array, "*B *out"]:
    """Computes ``x·weight``, or ``x·weightᵀ`` of gradients ``x``, in the dtype of ``x``.

    Args:
        weight: with the scales of :func:`sft_jax.models.quantize.factor_format`, which vary along the outputs only.
        inputs: the last dimensions of the input of the layer.
        outputs: those of its output.
    """
    kind = FORMATS[weight.fmt.method]
    codes, scales = weight.arrays["codes"], weight.arrays["scales"]
    per_output = jnp.repeat(scales[0], weight.fmt.block[1]).reshape(outputs) if scales.shape[1] > 1 else scales[0, 0]
    if transposed:
        return _times(x.astype(jnp.float32) * per_output, codes, kind, kind.gradient, x.dtype, inputs, outputs, True)
    return _times(x, codes, kind, kind.dtype, x.dtype, inputs, outputs, factor=per_output)


def rounded_product(
    x: Float[Array, "*B *in"],
    weight: Float[Array, "in out"],
    kind: EightBit,
    inputs: Dims,
    outputs: Dims,
    transposed: bool = False,
) -> Float[Array, "*B *out"]:
    """Computes ``x·weight``, or ``x·weightᵀ`` of gradients ``x``, in the dtype of ``x``; rounds the weight too.

    The weight has one scale, so that the codes of the forward and of the transposed product are the same.
    """
    codes, scale = rounded(weight, kind.dtype)
    dtype = kind.gradient if transposed else kind.dtype
    return _times(x, codes, kind, dtype, x.dtype, inputs, outputs, transposed, scale)


def rounded_outer(x: Float[Array, "*B m"], dy: Float[Array, "*B n"], kind: EightBit) -> Float[Array, "m n"]:
    """Computes ``Σ x ⊗ dy`` over all positions in float32; each factor has one scale."""
    (left, of_left), (right, of_right) = rounded(x, kind.dtype), rounded(dy, kind.gradient)
    positions = tuple(range(x.ndim - 1))
    return _dot(left, right, ((positions, positions), ((), ()))) * (of_left * of_right)


def rounded(x: Float[Array, "*S"], dtype: Any, last: int | None = None) -> tuple[Array, Float[Array, "*K"]]:
    """Returns the codes and the scales, float32: one for the ``last`` dimensions together, or for the whole array.

    The scale of zeros is 0, and so are their codes.
    """
    wide = x.astype(jnp.float32)
    axes = None if last is None else tuple(range(x.ndim - last, x.ndim))
    scale = jnp.max(jnp.abs(wide), axis=axes, keepdims=axes is not None) / largest_value(dtype)
    return to_codes(wide * reciprocal(scale), dtype), scale


def _times(
    x: Array,
    codes: Array,
    kind: EightBit,
    dtype: Any,
    out: Any,
    inputs: Dims,
    outputs: Dims,
    transposed: bool = False,
    factor: Any = None,
) -> Array:
    num, first, after = (len(outputs), len(inputs), inputs) if transposed else (len(inputs), 0, outputs)
    rows, scales = rounded(x, dtype, num if kind.by_row else None)
    dims = (tuple(range(x.ndim - num, x.ndim)), tuple(range(first, first + num)))
    sums = _dot(rows, codes.reshape(*inputs, *outputs), (dims, ((), ())))
    if kind.by_row:
        scales = scales.reshape(*scales.shape[: x.ndim - num], *(1 for _ in after))
    return (sums * (scales if factor is None else scales * factor)).astype(out)


def _dot(a: Array, b: Array, dims: Any) -> Array:
    """Multiplies codes; returns the sums in float32."""

    def native(a: Array, b: Array) -> Array:
        wide = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
        return lax.dot_general(a, b, dims, preferred_element_type=wide).astype(jnp.float32)

    def emulated(a: Array, b: Array) -> Array:  # a CPU has no fast product in eight bits; each one here is exact
        return lax.dot_general(a.astype(jnp.float32), b.astype(jnp.float32), dims)

    return lax.platform_dependent(a, b, cpu=emulated, default=native)
