"""DoRA (Liu et al. 2024): LoRA for the direction of a weight, and a trained magnitude per output column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sft_jax.adapters.lora import LoRA, lora_matrices
from sft_jax.models.context import Context
from sft_jax.models.layers import AdapterParam, Linear, broadcast_like, product_of
from sft_jax.models.projection import Adapter, project
from sft_jax.models.quantized import Matrix, in_dtype
from sft_jax.tree import Path
from sft_jax.typing import Array, Float


@dataclass(frozen=True)
class DoRA(LoRA):
    """``y = x · (W + scale · A · B) · magnitude / ‖W + scale · A · B‖``, with column norms treated as constants.

    The norm gets no gradient, as in section 4.3 of the paper and in PEFT.
    """

    PEFT: ClassVar[Mapping[str, Any]] = {"use_dora": True}
    adapts_experts: ClassVar[bool] = False

    def tensor_names(self) -> dict[str, str]:
        return super().tensor_names() | {"magnitude": "lora_magnitude_vector"}

    def attach(self, layer: Linear) -> None:
        super().attach(layer)
        *stack, _, out_dim = layer.weight.shape
        layer.attach(self, magnitude=AdapterParam(jnp.zeros((*stack, out_dim)), axes=(f"adapter_{layer.axes[1]}",)))

    def initialize(
        self,
        abstract: Mapping[Path, jax.ShapeDtypeStruct],
        layers: Callable[[Path], tuple[int, ...]],
        key: Array,
        weight: Callable[[Path], Matrix],
    ) -> dict[Path, Array]:
        """Initializes A and B as LoRA does, and the magnitude to the column norms of the frozen weight."""
        fresh = super().initialize(abstract, layers, key, weight)
        for path, leaf in abstract.items():
            if path[-1] == "magnitude":
                norms = partial(_column_norms, adapter=None, scale=0.0)
                norms = jax.vmap(norms) if layers(path) else norms
                fresh[path] = jax.jit(norms, out_shardings=leaf.sharding)(weight(path))
        return fresh

    def apply(self, x: Float[Array, "*B in"], layers: Sequence[Linear], context: Context) -> list[Array]:
        number, key = context.layer, context.dropout_key
        matrices = [layer.matrix(context) for layer in layers]
        adapters = [lora_matrices(layer) for layer in layers]
        factors = [
            None if adapter is None else layer.parameter("magnitude") / _column_norms(matrix, adapter, self.scale)
            for layer, matrix, adapter in zip(layers, matrices, adapters, strict=True)
        ]
        if key is None or self.dropout == 0:
            form = "joined" if self.form_in(context) == "joined" else "separate"
            outs = project(x, matrices, adapters, number, product_of(layers, self.scale, form=form))
            return [
                out if factor is None else out * broadcast_like(factor.reshape(layer.out_dims), out)
                for out, factor, layer in zip(outs, factors, layers, strict=True)
            ]
        outs = project(x, matrices, [None] * len(layers), number, product_of(layers))
        for i, one in enumerate(jax.random.split(key, len(layers))):
            factor = factors[i]
            if factor is not None:  # dropout applies to the adapter's contribution only
                dropped, how = self.apply_dropout(x, one), product_of([layers[i]], self.scale)
                (base,) = project(dropped, [matrices[i]], [None], number, how)
                (added,) = project(dropped, [None], [adapters[i]], number, how)
                factor = broadcast_like(factor.reshape(layers[i].out_dims), base)
                outs[i] += factor * (base + added) - base
        return outs

    def merge(self, weight: Float[np.ndarray, "in out"], parameters: Mapping[str, np.ndarray]) -> np.ndarray:
        merged = super().merge(weight, parameters)
        return merged * (parameters["magnitude"] / np.linalg.norm(merged, axis=0))

    def changes(self, parameters: Mapping[str, np.ndarray]) -> bool:
        return True


def _column_norms(matrix: Matrix, adapter: Adapter | None, scale: float) -> Float[Array, "out"]:
    """Returns ``‖W + scale · A · B‖`` of each column in float32, without a gradient.

    The sum is never materialized: ``‖w + s·A·b‖² = ‖w‖² + 2s · (wᵀA) · b + s² · bᵀ(AᵀA)b``.
    """
    weight = in_dtype(matrix, jnp.float32)
    squares = jnp.sum(weight * weight, axis=0)
    if adapter is not None:
        a, b = adapter
        products = jnp.matmul(a.T, weight, precision="highest"), jnp.matmul(a.T @ a, b, precision="highest")
        squares += 2 * scale * jnp.sum(products[0] * b, axis=0) + scale**2 * jnp.sum(products[1] * b, axis=0)
    return lax.stop_gradient(jnp.sqrt(squares))


METHOD = DoRA
