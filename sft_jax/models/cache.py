"""Keys and values of the tokens seen so far."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValues:
    """Rotated keys, and values, of one layer ``[B, S, K, H]`` or of all ``[L, B, S, K, H]``; slot = position."""

    k: Float[Array, "*L B S K H"]
    v: Float[Array, "*L B S K H"]

    def grown(self, num_slots: int) -> KeyValues:
        """All layers' cache with room for ``num_slots`` positions; the new slots hold zeros."""

        def grow(x: Array) -> Array:
            x = jnp.pad(x, [(0, 0), (0, 0), (0, num_slots - x.shape[2]), (0, 0), (0, 0)])
            return constrain(x, "layers", "batch", "whole_length", "kv_heads", "head_dim")

        return KeyValues(grow(self.k), grow(self.v))

    def written(self, new: KeyValues, positions: Int[Array, "B"]) -> KeyValues:
        """All layers' cache with one token a row written into its slot; in place where the buffer is donated."""
        rows = jnp.arange(positions.shape[0])

        def write(x: Array, token: Array) -> Array:
            return x.at[:, rows, positions].set(token[:, :, 0], mode="drop", unique_indices=True)

        return KeyValues(write(self.k, new.k), write(self.v, new.v))
