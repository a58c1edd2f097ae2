"""LoRA (Hu et al. 2021): ``y = x · (W + scale · A · B)`` with W frozen."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.models.context import Context
from sft_jax.models.layers import AdapterParam, Linear, product_of
from sft_jax.models.projection import Adapter, project
from sft_jax.models.quantized import Matrix
from sft_jax.tree import Path
from sft_jax.typing import Array, Float


@dataclass(frozen=True)
class LoRA:
    """The hyperparameters of a LoRA adapter, and its computation.

    Attributes:
        form: how the adapter is added, except in one-token decoding steps; see
            :func:`sft_jax.models.projection.project`.
        adapts_experts: whether PEFT has the method for experts.
        PEFT: the settings in ``adapter_config.json`` that distinguish this method from plain LoRA.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    form: str = "separate"

    PEFT: ClassVar[Mapping[str, Any]] = {}
    adapts_experts: ClassVar[bool] = True

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def tensor_names(self) -> dict[str, str]:
        """Returns the parameters and their PEFT names within a module."""
        return {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}

    def attach(self, layer: Linear) -> None:
        """Adds the adapter's parameters to a layer, whose weight may be abstract."""
        *stack, in_dim, out_dim = layer.weight.shape
        inner, outer = (f"adapter_{axis}" for axis in layer.axes)
        layer.attach(
            self,
            lora_a=AdapterParam(jnp.zeros((*stack, in_dim, self.rank)), axes=(*layer.stack_axes, inner, "rank")),
            lora_b=AdapterParam(jnp.zeros((*stack, self.rank, out_dim)), axes=(*layer.stack_axes, "rank", outer)),
        )

    def initialize(
        self,
        abstract: Mapping[Path, jax.ShapeDtypeStruct],
        layers: Callable[[Path], tuple[int, ...]],
        key: Array,
        weight: Callable[[Path], Matrix],
    ) -> dict[Path, Array]:
        """Initializes sharded parameters: A ~ U(-1/√in, 1/√in) and B = 0, so training starts at the base model.

        The bound is that of PEFT's Kaiming-uniform with a = √5. The values of a layer depend on its index, the name of
        the parameter within the layer and the key. They do not depend on how layers are stacked.

        Args:
            abstract: shapes, dtypes and shardings of all adapter parameters.
            layers: returns the indices of the decoder layers in a stacked parameter; none for another parameter.
            weight: returns the frozen weight ``[*stack, in, out]`` of the layer that a parameter belongs to.
        """
        chosen = {path: leaf for path, leaf in abstract.items() if path[-1] in ("lora_a", "lora_b")}

        def init() -> dict[Path, Array]:
            return {path: self._fresh(path, leaf, layers(path), key) for path, leaf in chosen.items()}

        return jax.jit(init, out_shardings={path: leaf.sharding for path, leaf in chosen.items()})()

    def _fresh(self, path: Path, leaf: jax.ShapeDtypeStruct, layers: Sequence[int], key: Array) -> Array:
        if path[-1] == "lora_b":
            return jnp.zeros(leaf.shape, leaf.dtype)
        bound = leaf.shape[-2] ** -0.5
        name = "/".join(("layers", *path[2:]) if layers else path)
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        if not layers:
            return jax.random.uniform(leaf_key, leaf.shape, leaf.dtype, -bound, bound)
        values = jax.random.uniform(leaf_key, (max(layers) + 1, *leaf.shape[1:]), leaf.dtype, -bound, bound)
        return values[np.asarray(layers)]

    def apply(self, x: Float[Array, "*B *in"], layers: Sequence[Linear], context: Context) -> list[Array]:
        """Returns the outputs of layers with the same input, without biases; one product computes ``x·A`` for all."""
        number, key = context.layer, context.dropout_key
        adapters, matrices = [lora_matrices(layer) for layer in layers], [layer.matrix(context) for layer in layers]
        if key is None or self.dropout == 0 or not any(adapters):
            how = product_of(layers, self.scale, form=self.form_in(context), compute=context.compute)
            return project(x, matrices, adapters, number, how)
        outs = project(x, matrices, [None] * len(layers), number, product_of(layers, compute=context.compute))
        for i, one in enumerate(jax.random.split(key, len(layers))):
            adapter = adapters[i]
            if adapter is not None:  # each adapter has its own dropout mask
                dropped = self.apply_dropout(x, one)
                outs[i] += project(dropped, [None], [adapter], number, product_of([layers[i]], self.scale))[0]
        return outs

    def form_in(self, context: Context) -> str:
        """Returns how the adapter is added; in a one-token decoding step, by products of its own, which cost least."""
        return "separate" if context.weight_stationary else self.form

    def apply_dropout(self, x: Float[Array, "*S"], key: Array) -> Float[Array, "*S"]:
        """Returns the input after dropout."""
        keep_mask = jax.random.bernoulli(key, 1.0 - self.dropout, x.shape)
        return jnp.where(keep_mask, x / (1.0 - self.dropout), jnp.zeros_like(x))

    def merge(self, weight: Float[np.ndarray, "in out"], parameters: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the merged weight in float32."""
        return weight + np.float32(self.scale) * (parameters["lora_a"] @ parameters["lora_b"])

    def changes(self, parameters: Mapping[str, np.ndarray]) -> bool:
        """Returns whether merging changes the weight; adding zeros would turn -0.0 into 0.0."""
        return bool(parameters["lora_b"].any())


def lora_matrices(layer: Linear) -> Adapter | None:
    """Returns ``lora_a`` and ``lora_b`` of a layer; None without an adapter."""
    return None if layer.variant is None else Adapter(layer.parameter("lora_a"), layer.parameter("lora_b"))


METHOD = LoRA
