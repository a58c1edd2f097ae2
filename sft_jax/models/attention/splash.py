"""TPU splash attention: a Pallas kernel that skips blocks the causal or sliding mask hides."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from sft_jax.models.remat import ATTENTION
from sft_jax.typing import Array, Float, Int


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    window: int | None = None,
    softcap: float | None = None,
    block: int = 512,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """See :func:`sft_jax.models.attention.kernel.attention`; on one device.

    Args:
        block: divides T, a multiple of 128.
        interpret: run the kernel's operations one by one, on any device.
    """
    _, length, num_heads, head_dim = q.shape
    causal: masks.Mask = (
        masks.CausalMask((length, length)) if window is None else masks.LocalMask((length, length), (window - 1, 0), 0)
    )
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([causal] * num_heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )

    def one_row(q: Array, k: Array, v: Array, segments: Array) -> Any:
        return kernel(q, k, v, segment_ids=splash.SegmentIds(q=segments, kv=segments))

    scaled = q * jnp.asarray(head_dim**-0.5, q.dtype)  # the kernel does not scale
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (scaled, k, v))
    return jnp.swapaxes(jax.vmap(one_row)(q, k, v, segment_ids), 1, 2)
