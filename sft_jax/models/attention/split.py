"""Sequences sharded along T over devices: each device computes some queries against all keys.

With contiguous parts, the device with the end of a long document would have almost twice the average work, because a
query attends to all positions before it. So parts are halved, and each device takes one half from each end (zigzag; Liu
et al. 2023, Brandon et al. 2023 on ring attention). Parts stay contiguous if a sliding window bounds the work of a
query, and over an odd number of devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax

from sft_jax.typing import Array, Float, Int


@dataclass(frozen=True)
class SplitSequences:
    """Sequences of ``length`` positions; each of ``num`` devices along a mesh axis holds a contiguous part.

    Call all methods except :meth:`positions` inside ``shard_map``. With 8 positions on 2 devices, where device 0 holds
    the positions 0 to 3, the two devices compute::

        balanced       0 1 6 7 │ 4 5 2 3     the half of even index first
        contiguous     0 1 2 3 │ 4 5 6 7
    """

    length: int
    num: int
    axis: str  # mesh axis
    balanced: bool

    @classmethod
    def of(cls, length: int, num: int, axis: str, window: int | None) -> SplitSequences:
        """Creates a balanced split if balancing helps and the sizes allow it."""
        return cls(length, num, axis, balanced=window is None and num % 2 == 0 and length % (2 * num) == 0)

    def positions(self) -> Int[np.ndarray, "num t"]:
        """Returns the positions of the queries of each device, in the order of the device."""
        positions = np.arange(self.length, dtype=np.int32)
        if not self.balanced:
            return positions.reshape(self.num, -1)
        halves = positions.reshape(2 * self.num, -1)
        chosen = [sorted((i, 2 * self.num - 1 - i), key=lambda half: half % 2) for i in range(self.num)]
        return halves[np.asarray(chosen)].reshape(self.num, -1)

    def local_positions(self) -> Int[Array, "t"]:
        """:meth:`positions` of this device."""
        return jnp.asarray(self.positions())[lax.axis_index(self.axis)]

    def redistribute(self, x: Float[Array, "B t *C"]) -> Float[Array, "B t *C"]:
        """Exchanges the part that this device holds for the part that it computes."""
        return self._exchange(x, inverse=False)

    def restore(self, x: Float[Array, "B t *C"]) -> Float[Array, "B t *C"]:
        """The inverse of :meth:`redistribute`."""
        return self._exchange(x, inverse=True)

    def all_gather(self, x: Float[Array, "B t *C"]) -> Float[Array, "B T *C"]:
        """All-gathers the parts in order; its gradient is a reduce-scatter."""
        return lax.all_gather(x, self.axis, axis=1, tiled=True)

    def _exchange(self, x: Array, inverse: bool) -> Array:
        if not self.balanced:
            return x
        exchanged = []
        for first, half in enumerate(jnp.split(x, 2, axis=1)):  # the halves of even index, then those of odd index
            pairs = [(i // 2, min(i, 2 * self.num - 1 - i)) for i in range(first, 2 * self.num, 2)]  # holds, takes
            exchanged.append(
                lax.ppermute(half, self.axis, [(takes, holds) for holds, takes in pairs] if inverse else pairs)
            )
        return jnp.concatenate(exchanged, axis=1)
