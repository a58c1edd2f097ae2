"""Rows that are split along T over devices: each computes some queries, against all keys.

Contiguous parts would give the device with the end of a long document almost twice the work of an average one, because
a query sees all that is before it. So parts are halved, and each device takes a half from either end (zigzag; Liu et
al. 2023, Brandon et al. 2023 on ring attention). Where a sliding window bounds the work of a query, parts stay as they
are, and so they do over an odd number of devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax

from sft_jax.typing import Array, Float, Int


@dataclass(frozen=True)
class SplitRows:
    """Rows of ``length`` slots, of which each of ``num`` devices along a mesh axis holds a contiguous part.

    All methods but :meth:`places` are called inside ``shard_map``. With 8 slots on 2 devices, of which device 0 holds
    the slots 0 to 3, the two take::

        balanced       0 1 6 7 │ 4 5 2 3     the even one of its two halves first
        contiguous     0 1 2 3 │ 4 5 6 7
    """

    length: int
    num: int
    axis: str  # of the mesh
    balanced: bool

    @classmethod
    def of(cls, length: int, num: int, axis: str, window: int | None) -> SplitRows:
        """Balanced where it matters and can be done."""
        return cls(length, num, axis, balanced=window is None and num % 2 == 0 and length % (2 * num) == 0)

    def places(self) -> Int[np.ndarray, "num t"]:
        """The slots whose queries each device takes, in its order."""
        slots = np.arange(self.length, dtype=np.int32)
        if not self.balanced:
            return slots.reshape(self.num, -1)
        halves = slots.reshape(2 * self.num, -1)
        taken = [sorted((i, 2 * self.num - 1 - i), key=lambda half: half % 2) for i in range(self.num)]
        return halves[np.asarray(taken)].reshape(self.num, -1)

    def my_places(self) -> Int[Array, "t"]:
        """:meth:`places` of this device."""
        return jnp.asarray(self.places())[lax.axis_index(self.axis)]

    def taken(self, x: Float[Array, "B t *C"]) -> Float[Array, "B t *C"]:
        """From what this device holds of a ``[B, T, …]`` to what it takes."""
        return self._exchanged(x, forth=True)

    def given_back(self, x: Float[Array, "B t *C"]) -> Float[Array, "B t *C"]:
        """The inverse of :meth:`taken`."""
        return self._exchanged(x, forth=False)

    def whole(self, x: Float[Array, "B t *C"]) -> Float[Array, "B T *C"]:
        """What all devices hold, in order; gradients are added up, and each device receives those of its part."""
        return lax.all_gather(x, self.axis, axis=1, tiled=True)

    def _exchanged(self, x: Array, forth: bool) -> Array:
        if not self.balanced:
            return x
        moved = []
        for first, half in enumerate(jnp.split(x, 2, axis=1)):  # the halves of even number, then the others
            pairs = [(i // 2, min(i, 2 * self.num - 1 - i)) for i in range(first, 2 * self.num, 2)]  # holds, takes
            moved.append(lax.ppermute(half, self.axis, pairs if forth else [(takes, holds) for holds, takes in pairs]))
        return jnp.concatenate(moved, axis=1)
