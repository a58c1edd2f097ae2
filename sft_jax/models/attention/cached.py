"""Attention of one more token to what a cache holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sft_jax.models.cache import KeyValues
from sft_jax.models.head import capped
from sft_jax.typing import Array, Float, Int

_NEVER = -1e30  # finite, like all scores


def cached_attention(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
    cache: KeyValues,
    positions: Int[Array, "B 1"],
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Float[Array, "B 1 N H"]:
    """Attention of one new token a row to itself and to the cache slots before its position.

    What is visible is as in :func:`sft_jax.models.attention.backend.attention`.

    The cache is only read: slots at or behind ``positions`` may hold anything.
    """
    num_rows, _, num_heads, head_dim = q.shape
    num_kv_heads, num_slots = k.shape[2], cache.k.shape[1]
    q = q.reshape(num_rows, 1, num_kv_heads, num_heads // num_kv_heads, head_dim)

    def scores(keys: Array) -> Array:
        products = jnp.einsum("btkgh,bskh->bkgts", q, keys, preferred_element_type=jnp.float32)
        return capped(products * (head_dim**-0.5 if scale is None else scale), softcap)

    distance = positions - jnp.arange(num_slots)[None, :]
    visible = distance > 0
    if window is not None:
        visible &= distance < window
    before = jnp.where(visible[:, None, None, None], scores(cache.k), _NEVER)
    weights = jax.nn.softmax(jnp.concatenate([before, scores(k)], axis=-1), axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights[..., :-1], cache.v)
    out += jnp.einsum("bkgts,bskh->btkgh", weights[..., -1:], v)
    return out.reshape(num_rows, 1, num_heads, head_dim)
