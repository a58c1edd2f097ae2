"""Inputs of each layer besides the hidden states: per-layer embeddings, as in Gemma 3n and Gemma 4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from sft_jax.models.architecture import Architecture, PerLayer
from sft_jax.models.context import Context
from sft_jax.models.layers import Embedding, Initializer, Linear, make_norm, without_gradient
from sft_jax.models.mlp import ACTIVATIONS
from sft_jax.models.remat import PRODUCT, checkpoint_name
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Bool, Float, Int


class PerLayerInputs(nnx.Module):
    """The module of :class:`PerLayer`: ``(norm(projection(x) / √D) + √P · embedding(token)) / √2`` for each layer.

    ``P`` is the number of channels per layer, and ``x`` the scaled embedding of the token. The embeddings of all layers
    are one table ``[V, L·P]``.
    """

    def __init__(self, spec: PerLayer, arch: Architecture, make: Initializer):
        self.num_layers, self.scale = arch.num_layers, arch.hidden_size**-0.5
        size = arch.num_layers * spec.size
        self.embed_tokens_per_layer = Embedding(spec.vocab_size, size, make, spec.size**0.5)
        self.per_layer_model_projection = Linear(arch.hidden_size, size, ("embed", "mlp"), make)
        self.per_layer_projection_norm = make_norm(spec.size, arch.norm, make)

    def __call__(
        self, ids: Int[Array, "B T"], is_alias: Bool[Array, "B T"] | None, x: Float[Array, "B T D"], context: Context
    ) -> Float[Array, "L B T P"]:
        """Returns the inputs of each layer."""
        sizes = (*ids.shape, self.num_layers, -1)
        of_token = self.embed_tokens_per_layer(ids, x.dtype, context.weight_stationary)
        of_token = without_gradient(of_token, is_alias).reshape(sizes)
        projected = checkpoint_name(self.per_layer_model_projection(x, context), PRODUCT) * self.scale
        total = self.per_layer_projection_norm(projected.reshape(sizes)) + of_token
        total = (total.astype(jnp.float32) * 2**-0.5).astype(x.dtype)
        return constrain(jnp.moveaxis(total, 2, 0), "layers", *context.stream[:2], "activation")


@dataclass(frozen=True)
class PerLayerSpec:
    """``projection(activation(gate(x)) · per_layer)``, for the inputs of this layer from :class:`PerLayerInputs`."""

    size: int
    activation: str

    is_mixer: ClassVar[bool] = False

    def module(self, dim: int, make: Initializer, stack: tuple[int, ...]) -> PerLayerBranch:
        return PerLayerBranch(self, dim, make, stack)


class PerLayerBranch(nnx.Module):
    """The module of :class:`PerLayerSpec`."""

    def __init__(self, spec: PerLayerSpec, dim: int, make: Initializer, stack: tuple[int, ...]):
        self.spec = spec
        self.per_layer_input_gate = Linear(dim, spec.size, ("embed", "mlp"), make, stack)
        self.per_layer_projection = Linear(spec.size, dim, ("mlp", "embed"), make, stack)

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        assert context.per_layer is not None
        in_context, out_context = context.split(2)
        gate = checkpoint_name(self.per_layer_input_gate(x, in_context), PRODUCT)
        gated = ACTIVATIONS[self.spec.activation](gate) * context.per_layer
        return checkpoint_name(self.per_layer_projection(gated, out_context), PRODUCT)
