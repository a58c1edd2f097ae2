"""Causal attention: within segments for whole rows, against a cache for one more token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from sft_jax.models.cache import KeyValues
from sft_jax.typing import Array, Float, Int

QUERY_CHUNK = 128
_NEVER = -1e30  # finite, so that a row of padding that sees nothing still has a softmax


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    window: int | Int[Array, ""] | None = None,
    query_chunk: int = QUERY_CHUNK,
) -> Float[Array, "B T N H"]:
    """Softmax attention where position t sees s iff ``s <= t``, both are in one segment, and ``t - s < window``.

    Queries are taken in chunks whose scores are recomputed in the backward pass, so memory grows with T and not with
    T². Scores and softmax are float32. Query heads ``g·K … g·K + G`` share key/value head g (grouped-query attention,
    Ainslie et al. 2023).

    Positions are those of the row: within one segment they differ from those of the document by a constant.
    """
    num_rows, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    group = num_heads // num_kv_heads
    q = q.reshape(num_rows, length, num_kv_heads, group, head_dim)
    key_positions = jnp.arange(length)

    def chunk_of_queries(q: Array, query_segments: Array, query_positions: Array) -> Array:
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
        distance = query_positions[:, None] - key_positions[None, :]
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        visible = visible[None] & (query_segments[:, :, None] == segment_ids[:, None, :])
        scores = jnp.where(visible[:, None, None], scores, _NEVER)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bkgts,bskh->btkgh", weights, v)

    if length <= query_chunk:
        out = chunk_of_queries(q, segment_ids, key_positions)
    else:
        padding = -length % query_chunk
        num_chunks = (length + padding) // query_chunk

        def split(x: Array) -> Array:  # [B, T, ...] -> [chunks, B, chunk, ...]
            x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(num_rows, num_chunks, query_chunk, *x.shape[2:]), 1, 0)

        positions = jnp.arange(length + padding).reshape(num_chunks, query_chunk)
        out = lax.map(lambda xs: jax.checkpoint(chunk_of_queries)(*xs), (split(q), split(segment_ids), positions))
        out = jnp.moveaxis(out, 0, 1).reshape(num_rows, length + padding, num_kv_heads, group, head_dim)[:, :length]
    return out.reshape(num_rows, length, num_heads, head_dim)


def cached_attention(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
    cache: KeyValues,
    positions: Int[Array, "B 1"],
    window: int | Int[Array, ""] | None = None,
) -> Float[Array, "B 1 N H"]:
    """Attention of one new token a row to itself and to the cache slots before its position, as in :func:`attention`.

    The cache is only read: slots at or behind ``positions`` may hold anything.
    """
    num_rows, _, num_heads, head_dim = q.shape
    num_kv_heads, num_slots = k.shape[2], cache.k.shape[1]
    q = q.reshape(num_rows, 1, num_kv_heads, num_heads // num_kv_heads, head_dim)

    def scores(keys: Array) -> Array:
        return jnp.einsum("btkgh,bskh->bkgts", q, keys, preferred_element_type=jnp.float32) * head_dim**-0.5

    distance = positions - jnp.arange(num_slots)[None, :]
    visible = distance > 0
    if window is not None:
        visible &= distance < window
    before = jnp.where(visible[:, None, None, None], scores(cache.k), _NEVER)
    weights = jax.nn.softmax(jnp.concatenate([before, scores(k)], axis=-1), axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights[..., :-1], cache.v)
    out += jnp.einsum("bkgts,bskh->btkgh", weights[..., -1:], v)
    return out.reshape(num_rows, 1, num_heads, head_dim)
