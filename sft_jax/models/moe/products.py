"""Products of groups of rows with the matrices of experts, each with an optional adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax

from sft_jax.models.moe.grouped import adapted_dot, grouped_dot
from sft_jax.models.projection import in_layer_dtype
from sft_jax.models.quantized import Matrix
from sft_jax.models.remat import PRODUCT, checkpoint_name
from sft_jax.typing import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertMatrix:
    """A linear layer of experts as plain data.

    Attributes:
        weight: ``[E, in, out]``, maybe quantized.
        bias: ``[E, out]``.
        adapter: ``lora_a [E, in, R]`` and ``lora_b [E, R, out]``.
        scale: of the adapter.
        layer: the index of the decoder layer, see :func:`~sft_jax.models.projection.in_layer_dtype`.
    """

    weight: Matrix
    bias: Float[Array, "E out"] | None
    adapter: tuple[Float[Array, "E in R"], Float[Array, "E R out"]] | None
    scale: float = field(metadata={"static": True})
    layer: Any


def grouped(
    x: Float[Array, "m in"],
    matrix: ExpertMatrix,
    weights: Float[Array, "m"] | None = None,
    *,
    sizes: Int[Array, "E"],
    experts: Int[Array, "m"],
) -> Float[Array, "m out"]:
    """Multiplies groups of consecutive rows by the matrices of their experts; rows beyond all groups are unspecified.

    Args:
        weights: multiply the biases; x has them already.
        sizes: the number of rows of each expert.
        experts: the expert of each row; out of bounds for those beyond all groups.
    """

    weight = in_layer_dtype(matrix.weight, x.dtype, matrix.layer)
    out: Any
    if matrix.adapter is None:
        out = grouped_dot(x, weight, sizes)
    else:
        a, b = (one.astype(x.dtype) for one in matrix.adapter)
        out = adapted_dot(x, weight, a, b, sizes, matrix.scale)
    if matrix.bias is not None:
        bias = matrix.bias.astype(x.dtype).at[experts].get(mode="fill", fill_value=0)
        out = out + (bias if weights is None else bias * weights[:, None])
    return checkpoint_name(out, PRODUCT)
