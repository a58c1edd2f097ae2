"""The cache of a recurrent mixer: its size does not depend on the number of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from sft_jax.typing import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecurrentState:
    """What later tokens need, of one layer or, with a leading dimension, of a stack of layers.

    Attributes:
        inputs: the last inputs of the convolution.
        memory: the state of the recurrence, float32; None for a mixer that only convolves.
    """

    inputs: Float[Array, "*L B J-1 C"]
    memory: Float[Array, "*L B N K V"] | None = None

    def resize(self, length: int) -> RecurrentState:  # the interface of KeyValues
        """Returns the same state: it has no positions."""
        return self

    def update(self, new: RecurrentState, positions: Int[Array, "B"]) -> RecurrentState:
        """Replaces the state with that after one more token."""
        return new
