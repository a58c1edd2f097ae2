"""The caches of attention."""

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
        return KeyValues(_write(self.k, new.k, positions), _write(self.v, new.v, positions))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Latents:
    """What latent attention keeps of each token, of one layer ``[B, S, C]`` or of a stack of layers ``[L, B, S, C]``.

    The channels are the compressed key and value of all heads, then the rotated key that all heads share.
    """

    entries: Float[Array, "*L B S C"]

    def resize(self, length: int) -> Latents:
        """Pads the cache of all layers with zeros to ``length`` positions."""
        entries = jnp.pad(self.entries, [(0, 0), (0, 0), (0, length - self.entries.shape[2]), (0, 0)])
        return Latents(constrain(entries, "layers", "batch", "unsplit_length", "activation"))

    def update(self, new: Latents, positions: Int[Array, "B"]) -> Latents:
        """Writes one token per sequence at its position, for all layers; in place if the buffer is donated."""
        return Latents(_write(self.entries, new.entries, positions))


def _write(x: Array, token: Array, positions: Int[Array, "B"]) -> Array:
    batch = jnp.arange(positions.shape[0])
    return x.at[:, batch, positions].set(token[:, :, 0], mode="drop", unique_indices=True)
