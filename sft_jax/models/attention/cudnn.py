"""NVIDIA cuDNN fused attention through ``jax.nn.dot_product_attention``."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from sft_jax.typing import Array, Float, Int


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int[Array, "B S"],
    window: int | None = None,
    scale: float | None = None,
    positions: Int[Array, "T"] | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """See :func:`sft_jax.models.attention.backend.attention`; on one device, 16-bit, an even sequence length.

    Scores are never stored. The segments become a mask ``[B, 1, T, S]``, which jax turns into a bias of two bytes per
    entry, and cuDNN computes its gradient: four bytes per entry in total, for one layer at a time. The public function
    has no smaller way to separate the segments of a packed sequence. The private segment offsets would be smaller, but
    are wrong for grouped queries in jax 0.10.2 (jax pull request 39521).

    Args:
        positions: positions of the T queries in their sequence of length S; None for all. The mask is then causal too.
        implementation: ``xla`` computes the same on any device and stores scores.
    """
    query_segments = segment_ids if positions is None else segment_ids[:, positions]
    mask = query_segments[:, None, :, None] == segment_ids[:, None, None, :]
    if positions is not None:
        distance = positions[:, None] - jnp.arange(k.shape[1], dtype=jnp.int32)
        mask &= (distance >= 0) & (distance < (k.shape[1] if window is None else window))
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        is_causal=positions is None,
        local_window_size=None if window is None or positions is not None else (window - 1, 0),
        implementation=implementation,
    )
