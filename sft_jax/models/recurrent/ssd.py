"""The state space duality recurrence of Mamba-2 (Dao & Gu 2024, https://arxiv.org/abs/2405.21060).

Each head has a memory ``M`` ``[S, H]``, which begins at zero in each segment::

    M[t] = exp(log_decay[t]) · M[t-1] + b[t] ⊗ x[t]
    y[t] = c[t] · M[t]

Tokens are computed in chunks. Within a chunk, token t reads token s with the weight ``exp(Σ log_decay[s+1 … t]) ·
c[t]·b[s]``, two matrix products as in attention. Between chunks, a scan carries the memory. Work and memory per token
do not depend on the length.

Letters: S size of the state, G groups of heads that share ``b`` and ``c``, R = N/G, C chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sft_jax.typing import Array, Bool, Float, Int

CHUNK = 128
_LEAST = -100.0  # e^-100 is zero in float32
_STEP = 1 / 128  # 1,024 decays of at most 100 add up exactly in multiples of it


class _Carry(NamedTuple):
    memory: Float[Array, "B G R S H"]
    segment: Int[Array, "B"]  # of the token before the chunk


def ssd(
    x: Float[Array, "B T N H"],
    log_decay: Float[Array, "B T N"],
    b: Float[Array, "B T G S"],
    c: Float[Array, "B T G S"],
    segment_ids: Int[Array, "B T"],
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N S H"]]:
    """Computes all tokens, in float32.

    Args:
        log_decay: at most 0; values below -100 count as -100.
        segment_ids: 0 is padding, only at the end of a sequence. It leaves the memory as it is.
        chunk: tokens per chunk, at most 1,024.

    Returns:
        The outputs in the dtype of ``x``, and the memory after the last segment of each sequence, float32.
    """
    batch, length, heads, head_dim = x.shape
    groups, state = b.shape[2:]
    chunk = min(chunk, length)
    padding = -length % chunk

    def chunks(array: Array) -> Array:
        """``[B, T, …]`` → ``[T/C, B, C, …]``"""
        array = jnp.pad(array, [(0, 0), (0, padding), *[(0, 0)] * (array.ndim - 2)])
        return jnp.moveaxis(array.reshape(batch, -1, chunk, *array.shape[2:]), 1, 0)

    by_group = (batch, length, groups, heads // groups)
    real = segment_ids > 0
    last = jnp.take_along_axis(segment_ids, jnp.maximum(jnp.sum(real, axis=1, keepdims=True) - 1, 0), axis=1)
    inputs = (
        chunks(x.reshape(*by_group, head_dim)),
        chunks(log_decay.reshape(by_group)),
        chunks(b),
        chunks(c),
        chunks(real),
    )
    # Padding belongs to the last segment, so that the memory at the end is that segment's.
    segments = jnp.where(chunks(real), chunks(segment_ids), last)
    memory = jnp.zeros((batch, groups, heads // groups, state, head_dim), jnp.float32)
    # The backward pass computes the C² weights of a chunk again instead of reading them.
    body = jax.checkpoint(_chunk, prevent_cse=False)
    carry, out = lax.scan(body, _Carry(memory, segment_ids[:, 0]), (*inputs, segments))
    out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, head_dim)[:, :length]
    return out, carry.memory.reshape(batch, heads, state, head_dim)


def ssd_step(
    x: Float[Array, "B 1 N H"],
    log_decay: Float[Array, "B 1 N"],
    b: Float[Array, "B 1 G S"],
    c: Float[Array, "B 1 G S"],
    memory: Float[Array, "B N S H"],
) -> tuple[Float[Array, "B 1 N H"], Float[Array, "B N S H"]]:
    """Computes one more token; returns the output in the dtype of ``x``, and the memory after it."""
    heads, groups = x.shape[2], b.shape[2]
    wide = x[:, 0].astype(jnp.float32)
    b, c = (jnp.repeat(one[:, 0].astype(jnp.float32), heads // groups, axis=1) for one in (b, c))
    decay = jnp.exp(log_decay[:, 0].astype(jnp.float32))
    memory = memory * decay[..., None, None] + b[..., None] * wide[:, :, None]
    return jnp.einsum("bns,bnsh->bnh", c, memory)[:, None].astype(x.dtype), memory


def _chunk(
    carry: _Carry,
    inputs: tuple[
        Float[Array, "B C G R H"],
        Float[Array, "B C G R"],
        Float[Array, "B C G S"],
        Float[Array, "B C G S"],
        Bool[Array, "B C"],
        Int[Array, "B C"],
    ],
) -> tuple[_Carry, Float[Array, "B C G R H"]]:
    """Computes the tokens of one chunk, and the memory after it."""
    x, log_decay, b, c, real, segments = inputs
    dtype = x.dtype
    x, log_decay, b, c = (one.astype(jnp.float32) for one in (x, log_decay, b, c))
    x = jnp.where(real[..., None, None, None], x, 0.0)
    log_decay = jnp.where(real[..., None, None], jnp.maximum(log_decay, _LEAST), 0.0)
    log_decay = jnp.moveaxis(log_decay, 1, -1)

    def decay(mask: Bool[Array, "B *C"], exponent: Float[Array, "B G R *C"]) -> Float[Array, "B G R *C"]:
        """Masks before the exponential: elsewhere, the exponent may be positive."""
        return jnp.exp(jnp.where(mask[:, None, None], exponent, -jnp.inf))

    time = jnp.arange(x.shape[1])
    earlier = (time[:, None] > time) & (segments[:, :, None] == segments[:, None])
    weights = jnp.where(time[:, None] == time, 1.0, decay(earlier, _between(log_decay)))
    scores = jnp.einsum("btgs,bugs->bgtu", c, b)
    out = jnp.einsum("bgrtu,bugrh->btgrh", scores[:, :, None] * weights, x)

    since_start = decay(segments == carry.segment[:, None], jnp.cumsum(log_decay, axis=-1))
    read = jnp.einsum("btgs,bgrsh->btgrh", c, carry.memory)
    out += jnp.moveaxis(since_start, -1, 1)[..., None] * read
    # The last token's segment continues. If another segment was open before the chunk, its since_start is 0.
    following = jnp.pad(log_decay[..., 1:], [(0, 0)] * 3 + [(0, 1)])
    later = lax.cumsum(following, axis=3, reverse=True)
    until_end = decay(segments == segments[:, -1:], later)
    memory = since_start[..., -1, None, None] * carry.memory
    memory += jnp.einsum("btgs,btgrh->bgrsh", b, jnp.moveaxis(until_end, -1, 1)[..., None] * x)
    return _Carry(memory, segments[:, -1]), out.astype(dtype)


@jax.custom_vjp
def _between(log_decay: Float[Array, "*B C"]) -> Float[Array, "*B C C"]:
    """Returns ``Σ log_decay[s+1 … t]`` at ``[t, s]`` where s < t; the rest is to be masked.

    Values and gradients are as precise as the decays between two tokens. The sum of a chunk may be -10,000, of which
    float32 keeps three decimals: a strong decay would blur the weak ones behind it, even those of the next segment.
    Therefore sums have two parts, one that adds up exactly and one that is small.
    """
    coarse = jnp.round(log_decay / _STEP) * _STEP
    parts = [jnp.cumsum(part, axis=-1) for part in (coarse, log_decay - coarse)]
    differences = [part[..., :, None] - part[..., None, :] for part in parts]
    return differences[0] + differences[1]


def _between_forward(log_decay: Array) -> tuple[Array, None]:
    return _between(log_decay), None


def _between_backward(_: None, d_out: Float[Array, "*B C C"]) -> tuple[Float[Array, "*B C"]]:
    """Adds up ``d_out[t, s]`` over ``s < r <= t`` for each r.

    Automatic differentiation would add up all rows and subtract all columns before r. That leaves the rounding errors
    of pairs that r is not between, as large as the gradient of a weak decay.
    """
    time = jnp.arange(d_out.shape[-1])
    until = jnp.matmul(d_out, (time[:, None] < time).astype(d_out.dtype))
    return (jnp.sum(jnp.where(time[:, None] >= time, until, 0.0), axis=-2),)


_between.defvjp(_between_forward, _between_backward)
