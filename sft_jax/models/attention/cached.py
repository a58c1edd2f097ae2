"""Attention of one new token to the cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sft_jax.models.cache import KeyValues
from sft_jax.models.head import capped
from sft_jax.typing import Array, Float, Int

_MASKED = -1e30  # mask value; finite, like all scores


def cached_attention(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K Hv"],
    cache: KeyValues,
    positions: Int[Array, "B 1"],
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    chunk: int | None = None,
) -> Float[Array, "B 1 N Hv"]:
    """Computes attention of one new token per sequence to itself and to the cached positions before it.

    Visibility is as in :func:`sft_jax.models.attention.backend.attention`. The cache is only read; its entries from
    ``positions`` on are ignored.
    """
    batch_size, _, num_heads, head_dim = q.shape
    num_kv_heads, cache_length = k.shape[2], cache.k.shape[1]
    q = q.reshape(batch_size, 1, num_kv_heads, num_heads // num_kv_heads, head_dim)

    def scores(keys: Array) -> Array:
        products = jnp.einsum("btkgh,bskh->bkgts", q, keys, preferred_element_type=jnp.float32)
        return capped(products * (head_dim**-0.5 if scale is None else scale), softcap)

    key_positions = jnp.arange(cache_length)[None, :]
    distance = positions - key_positions
    visible = distance > 0
    if window is not None:
        visible &= distance < window
    if chunk is not None:
        visible &= key_positions // chunk == positions // chunk
    before = jnp.where(visible[:, None, None, None], scores(cache.k), _MASKED)
    every = [before, scores(k)]
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(num_kv_heads, -1, 1, 1)
        every.append(jnp.broadcast_to(sinks, every[1].shape))
    weights = jax.nn.softmax(jnp.concatenate(every, axis=-1), axis=-1).astype(v.dtype)
    weights = weights if sinks is None else weights[..., :-1]
    out = jnp.einsum("bkgts,bskh->btkgh", weights[..., :-1], cache.v)
    out += jnp.einsum("bkgts,bskh->btkgh", weights[..., -1:], v)
    return out.reshape(batch_size, 1, num_heads, -1)
