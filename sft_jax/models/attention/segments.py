"""What a position sees, and what sees it: segments are contiguous, so that one number for each says it all."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from sft_jax.typing import Array, Bool, Int


def first_visible(segment_ids: Int[Array, "B T"], window: int | None = None) -> Int[Array, "B T"]:
    """The first position of its row that each position sees: of its own segment, and ``window - 1`` back at most.

    >>> first_visible(jnp.asarray([[1, 1, 1, 2, 2, 0]])).tolist()
    [[0, 0, 0, 3, 3, 5]]
    >>> first_visible(jnp.asarray([[1, 1, 1, 2, 2, 0]]), window=2).tolist()
    [[0, 0, 1, 3, 3, 5]]
    """
    place = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    starts = lax.cummax(jnp.where(_begins(segment_ids), place, 0), axis=1)
    return starts if window is None else jnp.maximum(starts, place - (window - 1))


def seen_until(segment_ids: Int[Array, "B T"], window: int | None = None) -> Int[Array, "B T"]:
    """The position behind the last one that sees each position: the end of its segment, or ``window`` behind itself.

    >>> seen_until(jnp.asarray([[1, 1, 1, 2, 2, 0]])).tolist()
    [[3, 3, 3, 5, 5, 6]]
    >>> seen_until(jnp.asarray([[1, 1, 1, 2, 2, 0]]), window=2).tolist()
    [[2, 3, 3, 5, 5, 6]]
    """
    num_rows, length = segment_ids.shape
    place = jnp.arange(length, dtype=jnp.int32)
    begins_next = jnp.concatenate([_begins(segment_ids)[:, 1:], jnp.ones((num_rows, 1), bool)], axis=1)
    ends = lax.cummin(jnp.where(begins_next, place + 1, length), axis=1, reverse=True)
    return ends if window is None else jnp.minimum(ends, place + window)


def _begins(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Whether a segment begins at a position."""
    first = jnp.ones((segment_ids.shape[0], 1), bool)
    return jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
