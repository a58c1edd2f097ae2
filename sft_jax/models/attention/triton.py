"""Fused attention for NVIDIA GPUs in Pallas Triton that computes only the blocks within documents, in both passes.

FlashAttention-2 (Dao 2023) with bounds from the data. Documents are contiguous, so the keys of a query lie between the
start of its document (or window) and itself, and the queries of a key between itself and the end of its document (or
window). There is no mask in memory, and the cost of a sequence is the cost of its documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from sft_jax.models.attention.segments import first_visible, visible_until
from sft_jax.models.attention.sinks import add_sinks, gradient_of_sinks
from sft_jax.models.remat import ATTENTION, checkpoint_name
from sft_jax.typing import Array, Float, Int

_MASKED = -1e30  # finite, so that a query with no visible key in a block has a finite maximum
_LOG2_E = math.log2(math.e)  # scores are in base two, because GPUs have exp2


class Tiles(NamedTuple):
    """The tile sizes of a kernel, and its Triton launch parameters."""

    outer: int  # queries per program; keys for the gradients of keys and values
    inner: int  # keys per loop iteration; queries for the gradients of keys and values
    warps: int
    stages: int


class Tuning(NamedTuple):
    """Tiles of the three kernels: the fastest of seven on an H200, for head dimensions 64 and 128."""

    forward: Tiles = Tiles(64, 64, 4, 3)
    keys: Tiles = Tiles(64, 64, 4, 2)  # gradients of keys and values
    queries: Tiles = Tiles(64, 64, 4, 2)  # gradients of queries


class _Static(NamedTuple):
    scale: float  # multiplies the products of queries and keys
    softcap: float | None
    tuning: Tuning
    interpret: bool


def triton_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    tuning: Tuning = Tuning(),  # noqa: B008
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """See :func:`sft_jax.models.attention.backend.attention`; on one device, 16-bit.

    T is a multiple of the tile sizes, H a power of two. Padding attends to itself only.

    Args:
        interpret: interpret the kernels, on any device.
    """
    length = q.shape[1]
    assert all(length % tiles.outer == length % tiles.inner == 0 for tiles in tuning), (length, tuning)
    position, is_padding = jnp.arange(length, dtype=jnp.int32), segment_ids == 0
    first = jnp.where(is_padding, position, first_visible(segment_ids, window))
    until = jnp.where(is_padding, position + 1, visible_until(segment_ids, window))
    static = _Static(q.shape[-1] ** -0.5 if scale is None else scale, softcap, tuning, interpret)
    return _attend(q, k, v, None if sinks is None else sinks.astype(jnp.float32), first, until, static)


# ``first`` [B, T] is the first visible key of each query, ``until`` the end of the queries that attend to each key.
# Both are non-decreasing along a sequence, so the values at the first and last position of a block bound the block.
@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q: Array, k: Array, v: Array, sinks: Array | None, first: Array, until: Array, static: _Static) -> Array:
    return _forward(q, k, v, sinks, first, static)[0]


def _forward_and_residuals(
    q: Array, k: Array, v: Array, sinks: Array | None, first: Array, until: Array, static: _Static
):
    out, log_total = (checkpoint_name(x, ATTENTION) for x in _forward(q, k, v, sinks, first, static))
    return out, (q, k, v, sinks, first, until, out, log_total)


def _forward(
    q: Array, k: Array, v: Array, sinks: Array | None, first: Array, static: _Static
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns the output, and the log-sum-exp of each query in base two."""
    batch_size, length, num_heads, head_dim = q.shape
    tiles, group = static.tuning.forward, num_heads // k.shape[2]
    query_spec, key_spec, bound_spec, total_spec = _specs(length, head_dim, tiles.outer, group)
    out, log_total = pl.pallas_call(
        partial(_forward_kernel, tiles=tiles, static=static),
        grid=(length // tiles.outer, num_heads, batch_size),
        in_specs=[query_spec, key_spec, key_spec, bound_spec],
        out_specs=[query_spec, total_spec],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch_size, num_heads, length), jnp.float32),
        ],
        **_compiled_as(tiles, static, "attention_forward"),
    )(q, k, v, first)
    return (out, log_total) if sinks is None else add_sinks(sinks, out, log_total)


def _backward(static: _Static, residuals: Any, d_out: Array):
    q, k, v, sinks, first, until, out, log_total = residuals
    batch_size, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    group = num_heads // num_kv_heads
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    delta = jnp.swapaxes(delta, 1, 2)

    tiles = static.tuning.queries
    query_spec, key_spec, bound_spec, total_spec = _specs(length, head_dim, tiles.outer, group)
    dq = pl.pallas_call(
        partial(_queries_kernel, tiles=tiles, static=static),
        grid=(length // tiles.outer, num_heads, batch_size),
        in_specs=[query_spec, key_spec, key_spec, bound_spec, query_spec, total_spec, total_spec],
        out_specs=query_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        **_compiled_as(tiles, static, "attention_queries"),
    )(q, k, v, first, d_out, log_total, delta)

    tiles = static.tuning.keys
    group_spec = pl.BlockSpec((None, length, group, head_dim), lambda j, h, b: (b, 0, h, 0))
    key_block_spec = pl.BlockSpec((None, tiles.outer, None, head_dim), lambda j, h, b: (b, j, h, 0))
    sequence_spec = pl.BlockSpec((None, length), lambda j, h, b: (b, 0))
    group_total_spec = pl.BlockSpec((None, group, length), lambda j, h, b: (b, h, 0))
    dk, dv = pl.pallas_call(
        partial(_keys_kernel, tiles=tiles, static=static),
        grid=(length // tiles.outer, num_kv_heads, batch_size),
        in_specs=[
            group_spec,
            key_block_spec,
            key_block_spec,
            sequence_spec,
            sequence_spec,
            group_spec,
            group_total_spec,
            group_total_spec,
        ],
        out_specs=[key_block_spec, key_block_spec],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        **_compiled_as(tiles, static, "attention_keys"),
    )(q, k, v, first, until, d_out, log_total, delta)
    d_sinks = None if sinks is None else gradient_of_sinks(sinks, log_total, delta)
    return dq, dk, dv, d_sinks, None, None


_attend.defvjp(_forward_and_residuals, _backward)


def _specs(length: int, head_dim: int, block: int, group: int) -> list[pl.BlockSpec]:
    """Block specs for one block of queries of one head: queries, all keys of the head, bounds, and log-sum-exps."""
    return [
        pl.BlockSpec((None, block, None, head_dim), lambda i, n, b: (b, i, n, 0)),
        pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n // group, 0)),
        pl.BlockSpec((None, length), lambda i, n, b: (b, 0)),
        pl.BlockSpec((None, None, block), lambda i, n, b: (b, n, i)),
    ]


def _compiled_as(tiles: Tiles, static: _Static, name: str) -> dict[str, Any]:
    parameters = plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages)
    return {"compiler_params": parameters, "interpret": static.interpret, "name": name}


def _forward_kernel(q_ref, k_ref, v_ref, first_ref, out_ref, total_ref, *, tiles: Tiles, static: _Static):
    i = pl.program_id(0)
    q, key_range = q_ref[...], _KeyRange.of_queries(i, first_ref, tiles)

    def block(masked: bool, j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        keys = pl.ds(j * tiles.inner, tiles.inner)
        scores, _ = _scores(plt.dot(q, k_ref[keys, :], trans_b=True), static)
        if masked:
            scores = jnp.where(key_range.visible(_positions(j, tiles.inner)[None, :]), scores, _MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_top[:, None])
        rescale = jnp.exp2(top - new_top)
        total = total * rescale + jnp.sum(weights, axis=1)
        out = out * rescale[:, None] + plt.dot(weights.astype(v_ref.dtype), v_ref[keys, :])
        return new_top, total, out

    start = (
        jnp.full((tiles.outer,), _MASKED, jnp.float32),
        jnp.zeros((tiles.outer,), jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    top, total, out = _over_blocks(block, key_range.blocks, start)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    total_ref[...] = top + jnp.log2(total)


def _queries_kernel(
    q_ref, k_ref, v_ref, first_ref, d_out_ref, total_ref, delta_ref, dq_ref, *, tiles: Tiles, static: _Static
):
    i = pl.program_id(0)
    q, d_out, total, delta = q_ref[...], d_out_ref[...], total_ref[...], delta_ref[...]
    key_range = _KeyRange.of_queries(i, first_ref, tiles)

    def block(masked: bool, j: Array, dq: Array) -> Array:
        keys = pl.ds(j * tiles.inner, tiles.inner)
        k = k_ref[keys, :]
        scores, slope = _scores(plt.dot(q, k, trans_b=True), static)
        weights = jnp.exp2(scores - total[:, None])
        if masked:
            weights = jnp.where(key_range.visible(_positions(j, tiles.inner)[None, :]), weights, 0.0)
        d_scores = weights * (plt.dot(d_out, v_ref[keys, :], trans_b=True) - delta[:, None])
        d_scores = d_scores if slope is None else d_scores * slope
        return dq + plt.dot(d_scores.astype(k.dtype), k)

    dq = _over_blocks(block, key_range.blocks, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * static.scale).astype(dq_ref.dtype)


def _keys_kernel(
    q_ref,
    k_ref,
    v_ref,
    first_ref,
    until_ref,
    d_out_ref,
    total_ref,
    delta_ref,
    dk_ref,
    dv_ref,
    *,
    tiles: Tiles,
    static: _Static,
):
    """Loops over the query heads of the group; scores are keys × queries here."""
    j = pl.program_id(0)
    k, v, positions = k_ref[...], v_ref[...], _positions(j, tiles.outer)[:, None]
    begin = j * tiles.outer
    last = begin + tiles.outer - 1
    blocks = _Blocks(
        begin // tiles.inner,
        (last + tiles.inner - 1) // tiles.inner,  # from here on, queries attend to the last key
        until_ref[begin] // tiles.inner,  # and before here, they all attend to the first key
        (until_ref[last] + tiles.inner - 1) // tiles.inner,
    )

    def head(g: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        def block(masked: bool, i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            dk, dv = carry
            queries = pl.ds(i * tiles.inner, tiles.inner)
            q, d_out = q_ref[queries, g, :], d_out_ref[queries, g, :]
            scores, slope = _scores(plt.dot(k, q, trans_b=True), static)
            weights = jnp.exp2(scores - total_ref[g, queries][None, :])
            if masked:
                first = first_ref[queries][None, :]
                visible = (positions <= _positions(i, tiles.inner)[None, :]) & (positions >= first)
                weights = jnp.where(visible, weights, 0.0)
            dv += plt.dot(weights.astype(v.dtype), d_out)
            d_scores = weights * (plt.dot(v, d_out, trans_b=True) - delta_ref[g, queries][None, :])
            d_scores = d_scores if slope is None else d_scores * slope
            return dk + plt.dot(d_scores.astype(k.dtype), q), dv

        return _over_blocks(block, blocks, carry)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, q_ref.shape[1], head, (zeros, zeros))
    dk_ref[...] = (dk * static.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


class _Blocks(NamedTuple):
    """The loop bounds of a program: masked up to ``whole``, fully visible up to ``rest``, masked up to ``end``."""

    begin: Array
    whole: Array
    rest: Array
    end: Array


class _KeyRange(NamedTuple):
    """The keys that a block of queries attends to."""

    last: Int[Array, "q 1"]  # last key: the position of the query
    first: Int[Array, "q 1"]  # first key
    blocks: _Blocks  # key blocks

    @staticmethod
    def of_queries(i: Array, first_ref: Any, tiles: Tiles) -> _KeyRange:
        begin = i * tiles.outer
        last = begin + tiles.outer - 1
        blocks = _Blocks(
            first_ref[begin] // tiles.inner,
            (first_ref[last] + tiles.inner - 1) // tiles.inner,  # from here on, keys are visible to the last query
            (begin + 1) // tiles.inner,  # and before here, to the first query
            last // tiles.inner + 1,
        )
        first = first_ref[pl.ds(begin, tiles.outer)]
        return _KeyRange(_positions(i, tiles.outer)[:, None], first[:, None], blocks)

    def visible(self, positions: Int[Array, "1 k"]) -> Array:
        return (positions <= self.last) & (positions >= self.first)


def _positions(block: Array, size: int) -> Int[Array, "size"]:
    return block * size + jnp.arange(size, dtype=jnp.int32)


def _over_blocks(block: Callable[[bool, Array, Any], Any], blocks: _Blocks, carry: Any) -> Any:
    """Loops over all blocks; fully visible blocks skip the mask."""
    whole = jnp.clip(blocks.whole, blocks.begin, blocks.end)
    rest = jnp.clip(blocks.rest, whole, blocks.end)
    carry = lax.fori_loop(blocks.begin, whole, partial(block, True), carry)
    carry = lax.fori_loop(whole, rest, partial(block, False), carry)
    return lax.fori_loop(rest, blocks.end, partial(block, True), carry)


def _scores(products: Float[Array, "a b"], static: _Static) -> tuple[Array, Array | None]:
    """Returns scaled and capped scores in base two, and the derivative of the cap."""
    if static.softcap is None:
        return products * (static.scale * _LOG2_E), None
    squashed = jnp.tanh(products * (static.scale / static.softcap))
    return squashed * (static.softcap * _LOG2_E), 1.0 - squashed**2
