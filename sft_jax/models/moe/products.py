"""Products of groups of rows with the matrices of experts, each with an optional adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from sft_jax.models.moe.grouped import grouped_dot
from sft_jax.models.projection import in_layer_dtype
from sft_jax.models.quantized import Matrix
from sft_jax.models.remat import ADAPTER, PRODUCT, checkpoint_name
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

    out = grouped_dot(x, in_layer_dtype(matrix.weight, x.dtype, matrix.layer), sizes)
    if matrix.adapter is not None:
        a, b = (one.astype(x.dtype) for one in matrix.adapter)
        # The compiler keeps A with its few columns in the layout of the transpose.
        x_a = checkpoint_name(grouped_dot(x, jnp.swapaxes(a, 1, 2), sizes, transposed=True), ADAPTER)
        out = out + grouped_dot(x_a * jnp.asarray(matrix.scale, x.dtype), b, sizes)
    if matrix.bias is not None:
        bias = matrix.bias.astype(x.dtype).at[experts].get(mode="fill", fill_value=0)
        out = out + (bias if weights is None else bias * weights[:, None])
    return checkpoint_name(out, PRODUCT)
