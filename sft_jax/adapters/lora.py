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
from sft_jax.models.layers import AdapterParam, Linear
from sft_jax.models.projection import Adapter, project
from sft_jax.models.quantized import Matrix
from sft_jax.tree import Path
from sft_jax.typing import Array, Float


@dataclass(frozen=True)
class LoRA:
    """The settings of an adapter, and what it does.

    Attributes:
        merged: compute with ``W + scale · A · B`` where a layer meets more than a token a sequence; see
            :func:`sft_jax.models.projection.project`.
        PEFT: the settings in ``adapter_config.json`` that tell this method from plain LoRA.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    merged: bool = False

    PEFT: ClassVar[Mapping[str, Any]] = {}

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def tensor_names(self) -> dict[str, str]:
        """The parameters, and what PEFT calls each within its module."""
        return {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}

    def attach(self, layer: Linear) -> None:
        """Give a layer, whose weight need not be there, its parameters."""
        *stack, in_dim, out_dim = layer.weight.shape
        inner, outer = (f"adapter_{axis}" for axis in layer.axes)
        layer.attach(
            self,
            lora_a=AdapterParam(jnp.zeros((*stack, in_dim, self.rank)), axes=(inner, "rank")),
            lora_b=AdapterParam(jnp.zeros((*stack, self.rank, out_dim)), axes=("rank", outer)),
        )

    def initialise(
        self,
        abstract: Mapping[Path, jax.ShapeDtypeStruct],
        layers: Callable[[Path], tuple[int, ...]],
        key: Array,
        weight: Callable[[Path], Matrix],
    ) -> dict[Path, Array]:
        """Fresh parameters, born sharded: A ~ U(-1/√in, 1/√in), B = 0, so that training starts at the base model.

        The bound is PEFT's Kaiming-uniform with a = √5. The numbers of a layer depend on its number, the name of the
        parameter within the layer and the key, and not on how layers are stacked.

        Args:
            abstract: of all adapter parameters.
            layers: the numbers of the layers that a parameter is stacked from.
            weight: the frozen weight ``[*stack, in, out]`` beside a parameter, by its path.
        """
        chosen = {path: leaf for path, leaf in abstract.items() if path[-1] in ("lora_a", "lora_b")}

        def init() -> dict[Path, Array]:
            return {path: self._fresh(path, leaf, layers(path), key) for path, leaf in chosen.items()}

        return jax.jit(init, out_shardings={path: leaf.sharding for path, leaf in chosen.items()})()

    def _fresh(self, path: Path, leaf: jax.ShapeDtypeStruct, layers: Sequence[int], key: Array) -> Array:
        if path[-1] == "lora_b":
            return jnp.zeros(leaf.shape, leaf.dtype)
        bound = leaf.shape[-2] ** -0.5
        name = "/".join(("layers", *path[2:]))
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        of_all = jax.random.uniform(leaf_key, (max(layers) + 1, *leaf.shape[1:]), leaf.dtype, -bound, bound)
        return of_all[np.asarray(layers)]

    def apply(self, x: Float[Array, "*B in"], layers: Sequence[Linear], context: Context) -> list[Array]:
        """What layers make of one input, without their biases; they share products with their A."""
        number, key = context.layer, context.dropout_key
        adapters, scales = [low_rank(layer) for layer in layers], [self.scale] * len(layers)
        matrices = [layer.matrix(context) for layer in layers]
        if key is None or self.dropout == 0 or not any(adapters):
            # For a token a sequence it would take longer to add the adapter to the weight than to multiply by both.
            return project(x, matrices, adapters, scales, number, self.merged and not context.weights_stay)
        outs = project(x, matrices, [None] * len(layers), scales, number)
        for i, one in enumerate(jax.random.split(key, len(layers))):
            adapter = adapters[i]
            if adapter is not None:  # each has an input of its own
                outs[i] += project(self.dropped(x, one), [None], [adapter], [self.scale], number)[0]
        return outs

    def dropped(self, x: Float[Array, "*B in"], key: Array) -> Float[Array, "*B in"]:
        """The input after dropout."""
        kept = jax.random.bernoulli(key, 1.0 - self.dropout, x.shape)
        return jnp.where(kept, x / (1.0 - self.dropout), jnp.zeros_like(x))

    def merge(self, weight: Float[np.ndarray, "in out"], parameters: Mapping[str, np.ndarray]) -> np.ndarray:
        """The weight with the adapter in it; float32."""
        return weight + np.float32(self.scale) * (parameters["lora_a"] @ parameters["lora_b"])

    def changes(self, parameters: Mapping[str, np.ndarray]) -> bool:
        """Whether it changes the weight at all; adding zero would turn -0.0 into 0.0."""
        return bool(parameters["lora_b"].any())


def low_rank(layer: Linear) -> Adapter | None:
    """The two matrices of a layer, where it has an adapter."""
    return None if layer.variant is None else Adapter(layer.parameter("lora_a"), layer.parameter("lora_b"))


METHOD = LoRA
