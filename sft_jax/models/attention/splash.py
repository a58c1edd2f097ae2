"""TPU splash attention: a Pallas kernel that skips blocks that the causal or sliding-window mask hides."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from sft_jax.models.remat import ATTENTION
from sft_jax.typing import Array, Float, Int


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    segment_ids: Int[Array, "B S"],
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    block: int = 512,
    interpret: bool = False,
    positions: Int[Array, "T"] | None = None,
    mask: Any = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """See :func:`sft_jax.models.attention.backend.attention`; on one device.

    Args:
        block: see :func:`make_splash_kernel`.
        interpret: interpret the kernel, on any device.
        positions: positions of the T queries in their sequence of length S; None for all.
        mask: the part of :func:`make_splash_kernel` for these positions; by default it is created here.
    """
    _, length, num_heads, head_dim = q.shape
    if mask is None:
        assert positions is None
        mask = make_splash_kernel(np.arange(length, dtype=np.int32)[None], num_heads, window, softcap, block, interpret)
    query_segments = segment_ids if positions is None else segment_ids[:, positions]
    sinks = None if sinks is None else _with_wide_gradient(sinks.astype(jnp.float32))

    def one_sequence(q: Array, k: Array, v: Array, query_segments: Array, key_segments: Array) -> Any:
        return mask(q, k, v, segment_ids=splash.SegmentIds(q=query_segments, kv=key_segments), sinks=sinks)

    scaled = q * jnp.asarray(head_dim**-0.5 if scale is None else scale, q.dtype)  # the kernel does not scale
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (scaled, k, v))
    return jnp.swapaxes(jax.vmap(one_sequence)(q, k, v, query_segments, segment_ids), 1, 2)


@jax.custom_vjp
def _with_wide_gradient(x: Float[Array, "N"]) -> Float[Array, "N"]:
    """Returns ``x``. Its gradient is float32, whereas that of the kernel has the dtype of queries, unlike the sinks."""
    return x


_with_wide_gradient.defvjp(lambda x: (x, None), lambda _, d_x: (d_x.astype(jnp.float32),))


def make_splash_kernel(
    positions: Int[np.ndarray, "num t"],
    num_heads: int,
    window: int | None = None,
    softcap: float | None = None,
    block: int = 512,
    interpret: bool = False,
) -> Any:
    """Creates the kernel for the queries of all devices; its arrays hold one part of the mask per device.

    Args:
        positions: the query positions of each of ``num`` devices; t is a multiple of 128.
        num_heads: number of query heads per device.
        block: block size in queries and keys; a power of two from 128 on, halved until it divides t.
    """
    block = math.gcd(block, positions.shape[1])
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mha(
        masks.MultiHeadMask([splash_mask(positions, window)] * num_heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=positions.shape[0],
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )


def splash_mask(positions: Int[np.ndarray, "num t"], window: int | None) -> masks.Mask:
    """Returns the mask ``[T, T]`` of queries and keys, without segments; queries are in the order of devices."""
    shape = (positions.size, positions.size)
    mask = _Causal(shape) if window is None else _Local(shape, (window - 1, 0), 0)
    mask.q_sequence = positions.reshape(-1)  # the positions that it compares with keys
    return mask


class _ByBlocks:
    """Mixin for masks that returns fully visible and fully hidden blocks without comparing their entries.

    Compilation of the kernel reads each of (T / block)² blocks six times.
    """

    q_sequence: np.ndarray
    reach = None  # how far back a query attends, itself not counted; None for no limit

    def __getitem__(self, at: tuple[slice, slice]) -> np.ndarray:
        queries = self.q_sequence[at[0]]
        first, last, size = int(queries.min()), int(queries.max()), (len(queries), at[1].stop - at[1].start)
        first_key, last_key = at[1].start, at[1].stop - 1
        if first_key > last or (self.reach is not None and last_key < first - self.reach):
            return _filled(size, False)
        if last_key <= first and (self.reach is None or first_key >= last - self.reach):
            return _filled(size, True)
        return super().__getitem__(at)  # type: ignore[misc]


class _Causal(_ByBlocks, masks.CausalMask):
    pass


class _Local(_ByBlocks, masks.LocalMask):
    @property
    def reach(self) -> int | None:  # type: ignore[override]
        return self.window_size[0]


@functools.cache
def _filled(size: tuple[int, int], value: bool) -> np.ndarray:
    return np.full(size, value)
