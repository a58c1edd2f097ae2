"""What the layers of a decoder are told besides their input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from sft_jax.models.architecture import Rope
from sft_jax.models.attention.backend import Backend
from sft_jax.typing import Array, Float, Int

SinCos = tuple[Array, Array]


@dataclass(frozen=True)
class Context:
    """What a layer is told; plain data that is built inside a traced function.

    Attributes:
        positions: of the tokens within their segments.
        segment_ids: None while one token a sequence is decoded.
        sin_cos: of the positions, for each kind of rotary embedding in the model.
        backend: of attention.
        weights_stay: compute products where the weights are, on each device's part of the model dimension, and sum
            them. Else weights are gathered where the tokens are, which many tokens are worth and one a sequence is not.
        layer: the number of the decoder layer.
        dropout_key: None for no dropout.
        cache: what the layer's mixer kept of earlier tokens, while one token a sequence is decoded.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None
    sin_cos: Mapping[Rope, SinCos]
    backend: Backend
    weights_stay: bool = False
    layer: Float[Array, ""] = field(default_factory=lambda: jnp.zeros(()))
    dropout_key: Array | None = None
    cache: Any = None

    def split(self, num: int) -> list[Context]:
        """The same, with a dropout key for each of ``num`` users."""
        if self.dropout_key is None:
            return [self] * num
        return [replace(self, dropout_key=key) for key in jax.random.split(self.dropout_key, num)]

    @property
    def stream(self) -> tuple[str, str, str]:
        """Logical axes of the hidden states that layers add to."""
        return ("replica", "whole_length", "embed") if self.weights_stay else ("batch", "length", "activation")
