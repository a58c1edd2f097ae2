"""Rotary position embedding: frequencies, their scaling for long contexts, and the rotation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sft_jax.models.architecture import Rope
from sft_jax.typing import Array, Float, Int


def inverse_frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, "H/2"]:
    """Returns one angular frequency per pair of channels, float32.

    ``linear`` divides all by ``factor`` (Chen et al. 2023). ``llama3`` keeps wavelengths shorter than
    ``original / high_freq_factor`` as they are, divides those longer than ``original / low_freq_factor`` by ``factor``
    and blends between (Llama 3.1 reference code; ``transformers.modeling_rope_utils``). ``yarn`` blends by channel
    between those that turn ``beta_fast`` and ``beta_slow`` times in the original context (Peng et al. 2023).
    ``longrope`` divides each by its own factor (Ding et al. 2024). ``proportional`` divides all by ``factor`` and sets
    the slowest to zero, except for a share (``transformers.modeling_rope_utils``).
    """
    frequency = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if rope.kind == "default":
        return frequency.astype(np.float32)
    if rope.kind == "linear":
        return (frequency / rope.factor).astype(np.float32)
    if rope.kind == "proportional":
        num_rotated = int(rope.share * head_dim // 2)
        return np.where(np.arange(head_dim // 2) < num_rotated, frequency / rope.factor, 0.0).astype(np.float32)
    if rope.kind == "longrope":
        return (frequency / np.asarray(rope.factors, np.float32)).astype(np.float32)
    if rope.kind == "yarn":
        return _yarn(rope, frequency, head_dim)
    assert rope.kind == "llama3", rope.kind
    turns = rope.original_max_position_embeddings * frequency / (2 * math.pi)  # within the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (keep * frequency + (1 - keep) * frequency / rope.factor).astype(np.float32)


def _yarn(rope: Rope, frequency: np.ndarray, head_dim: int) -> np.ndarray:
    def channel(turns: float) -> float:
        """Returns the pair of channels that makes this many turns within the original context."""
        length = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    stretched = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0.0, 1.0)
    return (stretched * frequency / rope.factor + (1 - stretched) * frequency).astype(np.float32)


def sin_cos(
    positions: Int[Array, "B T"], rope: Rope, head_dim: int, segment_ids: Int[Array, "B T"] | None = None
) -> tuple[Array, Array]:
    """Returns float32 sines and cosines ``[B, T, H/2]`` for all layers and heads, times ``rope.attention_factor``.

    Args:
        segment_ids: the documents, whose lengths decide between the two sets of factors of ``longrope``. None in
            one-token decoding steps, where the position decides.
    """
    frequencies: Any = inverse_frequencies(rope, head_dim)
    if rope.long_factors:
        is_long = _lengths(positions, segment_ids) > rope.original_max_position_embeddings
        long = inverse_frequencies(replace(rope, factors=rope.long_factors), head_dim)
        frequencies = jnp.where(is_long[..., None], long, frequencies)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    sin, cos = jnp.sin(-angles if rope.backwards else angles), jnp.cos(angles)
    return (sin, cos) if rope.attention_factor == 1.0 else (rope.attention_factor * sin, rope.attention_factor * cos)


def _lengths(positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """Returns the length of each token's document."""
    if segment_ids is None:
        return positions + 1
    index = jnp.arange(positions.shape[1], dtype=jnp.int32)
    is_last = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (0, 1)], constant_values=True)
    last = lax.cummin(jnp.where(is_last, index, positions.shape[1]), axis=1, reverse=True)
    return positions + last - index + 1


def rotate_heads(
    x: Float[Array, "B T N H"], rope: Rope, sin: Float[Array, "B T R/2"], cos: Float[Array, "B T R/2"]
) -> Float[Array, "B T N H"]:
    """Rotates the channels of each head that ``rope`` names, in its layout."""
    if rope.dims is not None and rope.dims < x.shape[-1]:
        rotated = rotate_heads(x[..., : rope.dims], replace(rope, dims=None), sin, cos)
        return jnp.concatenate([rotated, x[..., rope.dims :]], axis=-1)
    if not rope.interleaved:
        return rotate(x, sin, cos)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    rotated = rotate(jnp.swapaxes(pairs, -1, -2).reshape(x.shape), sin, cos)
    return jnp.swapaxes(rotated.reshape(*x.shape[:-1], 2, -1), -1, -2).reshape(x.shape)


@jax.custom_vjp
def rotate(x: Float[Array, "B T N H"], sin: Float[Array, "B T H/2"], cos: Float[Array, "B T H/2"]) -> Array:
    """Rotates channel ``i`` together with channel ``i + H/2``: the Hugging Face layout of q and k projections.

    Computes in float32 and returns the dtype of ``x``. The angles get no gradient.
    """
    return lax.platform_dependent(x, sin, cos, tpu=_rotate_by_product, default=_rotate_by_halves)


def _rotate_forward(x: Array, sin: Array, cos: Array) -> tuple[Array, tuple[Array, Array]]:
    return rotate(x, sin, cos), (sin, cos)


def _rotate_backward(residuals: tuple[Array, Array], d_out: Array) -> tuple[Array, None, None]:
    def by_product(d_out: Array, sin: Array, cos: Array) -> Array:
        return _rotate_by_product(d_out, -sin, cos)  # inverse rotation

    # The transpose instead of the inverse rotation keeps the program that the published figures were measured with.
    def by_halves(d_out: Array, sin: Array, cos: Array) -> Array:
        return jax.linear_transpose(lambda x: _rotate_by_halves(x, sin, cos), d_out)(d_out)[0]

    return lax.platform_dependent(d_out, *residuals, tpu=by_product, default=by_halves), None, None


rotate.defvjp(_rotate_forward, _rotate_backward)


def _rotate_by_halves(x: Array, sin: Array, cos: Array) -> Array:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = sin[:, :, None], cos[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _rotate_by_product(x: Array, sin: Array, cos: Array) -> Array:
    """The same rotation within rounding, as a product with a permutation matrix, which is nearly free on a TPU.

    There, slicing halves takes five fusions and three float32 copies per layer, 7 % of a step of Llama-3.1-8B.
    """
    half = x.shape[-1] // 2
    exchange = np.zeros((2 * half, 2 * half), np.float32)  # [first, second] → [-second, first]
    exchange[half:, :half], exchange[:half, half:] = -np.eye(half), np.eye(half)
    # At the highest precision each output is exactly ±1 times an input channel, in float32 too.
    other = jnp.einsum(
        "btnh,hk->btnk",
        x,
        jnp.asarray(exchange, x.dtype),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    sin, cos = (jnp.concatenate([one, one], axis=-1)[:, :, None] for one in (sin, cos))
    return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)
