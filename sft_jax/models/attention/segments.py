"""Where the keys that a position sees begin: segments are contiguous, so that one number for each says it all."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from sft_jax.typing import Array, Int


def first_visible(segment_ids: Int[Array, "B T"], window: int | None = None) -> Int[Array, "B T"]:
    """The first position of its row that each position sees: of its own segment, and ``window - 1`` back at most.

    >>> first_visible(jnp.asarray([[1, 1, 1, 2, 2, 0]])).tolist()
    [[0, 0, 0, 3, 3, 5]]
    >>> first_visible(jnp.asarray([[1, 1, 1, 2, 2, 0]]), window=2).tolist()
    [[0, 0, 1, 3, 3, 5]]
    """
    num_rows, length = segment_ids.shape
    place = jnp.arange(length, dtype=jnp.int32)
    begins = jnp.concatenate([jnp.ones((num_rows, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    starts = lax.cummax(jnp.where(begins, place, 0), axis=1)
    return starts if window is None else jnp.maximum(starts, place - (window - 1))
