"""The inputs of decoder layers besides the hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from sft_jax.models.architecture import Rope
from sft_jax.models.attention.backend import Backend
from sft_jax.models.eight_bit import EightBit
from sft_jax.typing import Array, Float, Int

SinCos = tuple[Array, Array]


@dataclass(frozen=True)
class Context:
    """The inputs of a layer besides the hidden states; plain data, built inside a traced function.

    Attributes:
        positions: position of each token within its segment.
        segment_ids: None during one-token decoding.
        sin_cos: sines and cosines of the positions, for each rotary embedding of the model.
        backend: the attention backend.
        weight_stationary: keep weights sharded along the model dimension and all-reduce the products, as in one-token
            decoding. Otherwise weights are all-gathered, which pays off for many tokens only.
        compute: how products with trained weights are rounded to eight bits; None for no rounding.
        layer: the index of the decoder layer.
        dropout_key: None for no dropout.
        cache: the mixer's cache of earlier tokens during one-token decoding.
        per_layer: the inputs of this layer of :class:`~sft_jax.models.architecture.PerLayer`.
        shared: the keys and values that earlier layers published, by name.
        shared_cache: those of earlier tokens, during one-token decoding.
        balances: where each router of the layer appends its load-balancing loss; None if nobody asks for it.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None
    sin_cos: Mapping[Rope, SinCos]
    backend: Backend
    weight_stationary: bool = False
    compute: EightBit | None = None
    layer: Float[Array, ""] = field(default_factory=lambda: jnp.zeros(()))
    dropout_key: Array | None = None
    cache: Any = None
    per_layer: Float[Array, "B T P"] | None = None
    shared: Mapping[str, Any] = field(default_factory=dict)
    shared_cache: Mapping[str, Any] = field(default_factory=dict)
    balances: list[Float[Array, ""]] | None = None

    def split(self, num: int) -> list[Context]:
        """Returns ``num`` copies, each with its own dropout key."""
        if self.dropout_key is None:
            return [self] * num
        return [replace(self, dropout_key=key) for key in jax.random.split(self.dropout_key, num)]

    @property
    def stream(self) -> tuple[str, str, str]:
        """Returns the logical axes of the residual stream."""
        return ("replica", "unsplit_length", "embed") if self.weight_stationary else ("batch", "length", "activation")
