"""The key/value cache."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValues:
    """Rotated keys, and values, of one layer ``[B, S, K, H]`` or of a stack of layers ``[L, B, S, K, H]``."""

    k: Float[Array, "*L B S K H"]
    v: Float[Array, "*L B S K H"]

    def resize(self, length: int) -> KeyValues:
        """Pads the cache of all layers with zeros to ``length`` positions."""

        def pad(x: Array) -> Array:
            x = jnp.pad(x, [(0, 0), (0, 0), (0, length - x.shape[2]), (0, 0), (0, 0)])
            return constrain(x, "layers", "batch", "unsplit_length", "kv_heads", "head_dim")

        return KeyValues(pad(self.k), pad(self.v))

    def update(self, new: KeyValues, positions: Int[Array, "B"]) -> KeyValues:
        """Writes one token per sequence at its position, for all layers; in place if the buffer is donated."""
        batch = jnp.arange(positions.shape[0])

        def write(x: Array, token: Array) -> Array:
            return x.at[:, batch, positions].set(token[:, :, 0], mode="drop", unique_indices=True)

        return KeyValues(write(self.k, new.k), write(self.v, new.v))
