"""Visibility bounds of positions. Segments are contiguous, so one bound per position is enough."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from sft_jax.typing import Array, Bool, Int


def first_visible(segment_ids: Int[Array, "B T"], window: int | None = None) -> Int[Array, "B T"]:
    """Returns the first position that each position attends to: its segment start, at most ``window - 1`` back.

    >>> first_visible(jnp.asarray([[1, 1, 1, 2, 2, 0]])).tolist()
    [[0, 0, 0, 3, 3, 5]]
    >>> first_visible(jnp.asarray([[1, 1, 1, 2, 2, 0]]), window=2).tolist()
    [[0, 0, 1, 3, 3, 5]]
    """
    position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    starts = lax.cummax(jnp.where(_begins(segment_ids), position, 0), axis=1)
    return starts if window is None else jnp.maximum(starts, position - (window - 1))


def visible_until(segment_ids: Int[Array, "B T"], window: int | None = None) -> Int[Array, "B T"]:
    """Returns the end of the positions that attend to each position: its segment end, at most ``window`` on.

    >>> visible_until(jnp.asarray([[1, 1, 1, 2, 2, 0]])).tolist()
    [[3, 3, 3, 5, 5, 6]]
    >>> visible_until(jnp.asarray([[1, 1, 1, 2, 2, 0]]), window=2).tolist()
    [[2, 3, 3, 5, 5, 6]]
    """
    batch_size, length = segment_ids.shape
    position = jnp.arange(length, dtype=jnp.int32)
    begins_next = jnp.concatenate([_begins(segment_ids)[:, 1:], jnp.ones((batch_size, 1), bool)], axis=1)
    ends = lax.cummin(jnp.where(begins_next, position + 1, length), axis=1, reverse=True)
    return ends if window is None else jnp.minimum(ends, position + window)


def chunk_segments(segment_ids: Int[Array, "B T"], chunk: int) -> Int[Array, "B T"]:
    """Returns segment ids that are distinct for all chunks of ``chunk`` positions of all segments; 0 stays padding.

    The id of a chunk is its first position, counted from one.

    >>> chunk_segments(jnp.asarray([[7, 7, 7, 7, 7, 8, 8, 8, 0]]), 3).tolist()
    [[1, 1, 1, 4, 4, 6, 6, 6, 0]]
    """
    position, start = jnp.arange(segment_ids.shape[1], dtype=jnp.int32), first_visible(segment_ids)
    first = position - (position - start) % chunk
    return jnp.where(segment_ids == 0, 0, first + 1)


def _begins(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Returns whether a segment begins at each position."""
    first = jnp.ones((segment_ids.shape[0], 1), bool)
    return jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
