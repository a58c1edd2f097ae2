"""Attention in plain XLA that skips fully masked blocks, so its cost depends on the document lengths.

Queries and keys are processed in blocks. A segment is contiguous, so the visible keys of a block of queries lie between
the start of the first query's segment (or window) and the last query. A loop with bounds from the data runs over these
blocks only, for any subset of the queries. Softmax is computed online, and the backward pass recomputes scores from the
saved log-sum-exp (FlashAttention-2, Dao 2023), so memory grows with T and not with T².
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sft_jax.models.attention.segments import first_visible
from sft_jax.models.remat import ATTENTION, checkpoint_name
from sft_jax.typing import Array, Float, Int

BLOCK = 64
_MASKED = -1e30  # finite, so that softmax is defined for padding with no visible key


class _KeyRange(NamedTuple):
    """The first and last visible key of each query, in blocks."""

    last: Int[Array, "blocks block"]  # the position of the query
    first: Int[Array, "blocks block"]

    def block_range(self, block: int) -> tuple[Array, Array]:
        """Returns the loop bounds over key blocks for one block of queries."""
        return jnp.min(self.first) // block, jnp.max(self.last) // block + 1


class _Static(NamedTuple):
    block: int
    softcap: float | None


def xla_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    segment_ids: Int[Array, "B S"],
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    block: int = BLOCK,
    positions: Int[Array, "T"] | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """See :func:`sft_jax.models.attention.backend.attention`; on one device.

    Any shape and dtype; scores and softmax are float32.

    Args:
        positions: positions of the T queries in their sequence of length S; None for all; may be traced. Those of a
            block should be close together, because a block computes all keys between them.

    The sequences are concatenated into one: sequences, like documents, are segments that do not attend to each other.
    Two sequences of length four, three documents, blocks of two::

        segment_ids   1 1 2 2 │ 1 1 1 0
        position      0 1 2 3 │ 4 5 6 7
        first key     0 0 2 2 │ 4 4 4 7      the start of the segment
        key blocks of query block   0: 0…0   1: 1…1   2: 2…2   3: 2…3
    """
    batch_size, num_queries, num_heads, head_dim = q.shape
    length, num_kv_heads = k.shape[1:3]
    size = batch_size * num_queries
    block = min(block, size)
    padding = -size % block

    def blocks(x: Array) -> Array:  # [B, T or S, heads, H] -> [heads, blocks, block, H]
        x = x.reshape(-1, *x.shape[2:])
        x = jnp.pad(x, [(0, -x.shape[0] % block), (0, 0), (0, 0)])
        return jnp.moveaxis(x.reshape(-1, block, *x.shape[1:]), 2, 0)

    def query_blocks(x: Array) -> Array:  # [B, S], positions within each sequence -> [blocks, block]
        x = x + length * jnp.arange(batch_size, dtype=jnp.int32)[:, None]
        x = x if positions is None else x[:, positions]
        return jnp.pad(x.reshape(size), (0, padding), mode="edge").reshape(-1, block)

    position = query_blocks(jnp.arange(length, dtype=jnp.int32)[None])
    first_key = query_blocks(first_visible(segment_ids, window))
    scaled = blocks(q * jnp.asarray(head_dim**-0.5 if scale is None else scale, q.dtype))
    scaled = scaled.reshape(num_kv_heads, num_heads // num_kv_heads, *scaled.shape[1:])
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(scaled.shape[:2])
    key_range = _KeyRange(last=position, first=first_key)
    out: Any = _blockwise(scaled, blocks(k), blocks(v), sinks, key_range, _Static(block, softcap))
    out = jnp.moveaxis(out, (2, 3), (0, 1)).reshape(size + padding, num_heads, v.shape[-1])
    return out[:size].reshape(*q.shape[:-1], v.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blockwise(q: Array, k: Array, v: Array, sinks: Array | None, key_range: _KeyRange, static: _Static) -> Array:
    """Attention of scaled queries ``[K, G, blocks, block, H]`` to keys and values ``[K, blocks, block, H or Hv]``.

    A sink ``[K, G]`` is a score of each query with the value zero.
    """
    return _forward(q, k, v, sinks, key_range, static)[0]


def _scores(q: Array, k: Array, key_range: _KeyRange, j: Array, static: _Static) -> tuple[Array, Array | None]:
    """Returns capped and masked scores ``[K, G, t, s]`` for key block j, and the derivative of the cap."""
    scores = jnp.einsum("kgth,ksh->kgts", q, k, preferred_element_type=jnp.float32)
    slope = None
    if static.softcap is not None:
        squashed = jnp.tanh(scores / static.softcap)
        scores, slope = static.softcap * squashed, 1.0 - squashed**2
    key_position = j * static.block + jnp.arange(static.block)[None]
    visible = (key_position <= key_range.last[:, None]) & (key_position >= key_range.first[:, None])
    return jnp.where(visible, scores, _MASKED), slope


def _at(x: Array, i: Array, axis: int) -> Array:
    return lax.dynamic_index_in_dim(x, i, axis, keepdims=False)


def _forward(
    q: Array, k: Array, v: Array, sinks: Array | None, key_range: _KeyRange, static: _Static
) -> tuple[Array, Array]:
    def query_block(scanned: tuple[Array, _KeyRange]) -> tuple[Array, Array]:
        qi, range_i = scanned

        def key_block(j: Array, carry: Any) -> Any:
            top, total, out = carry
            scores, _ = _scores(qi, _at(k, j, 1), range_i, j, static)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_top[..., None])
            rescale = jnp.exp(top - new_top)
            total = total * rescale + jnp.sum(weights, axis=-1)
            new = jnp.einsum(
                "kgts,ksh->kgth", weights.astype(v.dtype), _at(v, j, 1), preferred_element_type=jnp.float32
            )
            return new_top, total, out * rescale[..., None] + new

        if sinks is None:
            top, total = jnp.full(qi.shape[:-1], _MASKED, jnp.float32), jnp.zeros(qi.shape[:-1], jnp.float32)
        else:  # begin with the sink as the largest score so far; its weight is one
            top, total = jnp.broadcast_to(sinks[..., None], qi.shape[:-1]), jnp.ones(qi.shape[:-1], jnp.float32)
        start = (top, total, jnp.zeros((*qi.shape[:-1], v.shape[-1]), jnp.float32))
        first, end = range_i.block_range(static.block)
        top, total, out = lax.fori_loop(first, end, key_block, start)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, log_total = lax.map(query_block, (jnp.moveaxis(q, 2, 0), key_range))
    return jnp.moveaxis(out, 0, 2), log_total


def _forward_and_residuals(q: Array, k: Array, v: Array, sinks: Array | None, key_range: _KeyRange, static: _Static):
    out, log_total = (checkpoint_name(x, ATTENTION) for x in _forward(q, k, v, sinks, key_range, static))
    return out, (q, k, v, sinks, key_range, out, log_total)


def _backward(static: _Static, residuals: Any, d_out: Array):
    q, k, v, sinks, key_range, out, log_total = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def query_block(carry: Any, scanned: Any) -> Any:
        qi, range_i, d_outi, log_totali, deltai = scanned

        def key_block(j: Array, carry: Any) -> Any:
            dq, dk, dv = carry
            kj, vj = _at(k, j, 1), _at(v, j, 1)
            scores, slope = _scores(qi, kj, range_i, j, static)
            weights = jnp.exp(scores - log_totali[..., None])
            d_weights = jnp.einsum("kgth,ksh->kgts", d_outi, vj, preferred_element_type=jnp.float32)
            d_scores = weights * (d_weights - deltai[..., None])
            d_scores = (d_scores if slope is None else d_scores * slope).astype(q.dtype)
            dvj = jnp.einsum("kgts,kgth->ksh", weights.astype(v.dtype), d_outi, preferred_element_type=jnp.float32)
            dkj = jnp.einsum("kgts,kgth->ksh", d_scores, qi, preferred_element_type=jnp.float32)
            dq += jnp.einsum("kgts,ksh->kgth", d_scores, kj, preferred_element_type=jnp.float32)
            dk, dv = (lax.dynamic_update_index_in_dim(x, _at(x, j, 1) + new, j, 1) for x, new in ((dk, dkj), (dv, dvj)))
            return dq, dk, dv

        first, end = range_i.block_range(static.block)
        start = (jnp.zeros(qi.shape, jnp.float32), *carry)
        dq, dk, dv = lax.fori_loop(first, end, key_block, start)
        return (dk, dv), dq.astype(q.dtype)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    by_block = [jnp.moveaxis(x, 2, 0) for x in (q, d_out, delta)]
    scanned = (by_block[0], key_range, by_block[1], log_total, by_block[2])
    (dk, dv), dq = lax.scan(query_block, zeros, scanned)
    d_sinks = None
    if sinks is not None:
        weights = jnp.exp(sinks[..., None] - log_total)  # [blocks, K, G, block], like log_total
        d_sinks = -jnp.sum(weights * by_block[2], axis=(0, 3))
    return jnp.moveaxis(dq, 0, 2), dk.astype(k.dtype), dv.astype(v.dtype), d_sinks, None


_blockwise.defvjp(_forward_and_residuals, _backward)
