"""NVIDIA cuDNN's fused attention through jax's public function."""

from __future__ import annotations

from typing import Literal

import jax

from sft_jax.typing import Array, Float, Int


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    window: int | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """See :func:`sft_jax.models.attention.kernel.attention`; on one device, 16-bit, an even number of slots.

    Scores are never stored, but the segments are given as a mask ``[B, 1, T, T]``, which becomes a bias of two bytes an
    entry, and jax asks cuDNN for its gradient: four bytes an entry together, of one layer at a time. The public
    function has nothing smaller that tells several segments of a row apart, and the private offsets that would do are
    wrong for grouped queries in jax 0.10.2 (jax pull request 39521).

    Args:
        implementation: ``xla`` computes the same call on any device, with scores stored.
    """
    same_segment = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=same_segment,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
