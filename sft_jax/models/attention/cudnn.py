"""NVIDIA cuDNN's fused attention through jax's public function."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from sft_jax.models.attention.spec import Request
from sft_jax.typing import Array, Float, Int


def obstacle(request: Request) -> str | None:
    """Why it cannot compute this; None where it can."""
    if found := request.obstacle_of_16_bits():
        return found
    head_dim = request.spec.head_dim
    if head_dim % 8 or head_dim > 128:
        return f"needs a head dimension up to 128, a multiple of 8, not {head_dim}"
    return "has no soft cap" if request.spec.softcap is not None else request.obstacle_of_length(2)


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int[Array, "B S"],
    window: int | None = None,
    scale: float | None = None,
    places: Int[Array, "T"] | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """See :func:`sft_jax.models.attention.backend.attention`; on one device, 16-bit, an even number of slots.

    Scores are never stored, but the segments are given as a mask ``[B, 1, T, S]``, which becomes a bias of two bytes an
    entry, and jax asks cuDNN for its gradient: four bytes an entry together, of one layer at a time. The public
    function has nothing smaller that tells several segments of a row apart, and the private offsets that would do are
    wrong for grouped queries in jax 0.10.2 (jax pull request 39521).

    Args:
        places: the slots of a row that the queries are in, where they are not all of its S slots; the mask then says
            what comes before what as well.
        implementation: ``xla`` computes the same call on any device, with scores stored.
    """
    of_queries = segment_ids if places is None else segment_ids[:, places]
    mask = of_queries[:, None, :, None] == segment_ids[:, None, None, :]
    if places is not None:
        distance = places[:, None] - jnp.arange(k.shape[1], dtype=jnp.int32)
        mask &= (distance >= 0) & (distance < (k.shape[1] if window is None else window))
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        is_causal=places is None,
        local_window_size=None if window is None or places is not None else (window - 1, 0),
        implementation=implementation,
    )
