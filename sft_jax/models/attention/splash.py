"""TPU splash attention: a Pallas kernel that skips blocks the causal or sliding mask hides."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from sft_jax.models.attention.spec import Request
from sft_jax.models.remat import ATTENTION
from sft_jax.typing import Array, Float, Int


def obstacle(request: Request) -> str | None:
    """Why it cannot compute this; None where it can."""
    return "needs a TPU" if request.device.platform != "tpu" else request.obstacle_of_length(128)


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int[Array, "B S"],
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    block: int = 512,
    interpret: bool = False,
    places: Int[Array, "T"] | None = None,
    mask: Any = None,
) -> Float[Array, "B T N H"]:
    """See :func:`sft_jax.models.attention.backend.attention`; on one device.

    Args:
        block: see :func:`make_kernel`.
        interpret: run the kernel's operations one by one, on any device.
        places: the slots of a row that the queries are in, where they are not all of its S slots.
        mask: of :func:`make_kernel`, the part for these places; by default it is made here.
    """
    _, length, num_heads, head_dim = q.shape
    if mask is None:
        assert places is None
        mask = make_kernel(np.arange(length, dtype=np.int32)[None], num_heads, window, softcap, block, interpret)
    of_queries = segment_ids if places is None else segment_ids[:, places]

    def one_row(q: Array, k: Array, v: Array, of_queries: Array, of_keys: Array) -> Any:
        return mask(q, k, v, segment_ids=splash.SegmentIds(q=of_queries, kv=of_keys))

    scaled = q * jnp.asarray(head_dim**-0.5 if scale is None else scale, q.dtype)  # the kernel does not scale
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (scaled, k, v))
    return jnp.swapaxes(jax.vmap(one_row)(q, k, v, of_queries, segment_ids), 1, 2)


def make_kernel(
    places: Int[np.ndarray, "num t"],
    num_heads: int,
    window: int | None = None,
    softcap: float | None = None,
    block: int = 512,
    interpret: bool = False,
) -> Any:
    """The kernel for the queries of all devices, with what each has to know of the mask in arrays, a part for each.

    Args:
        places: the slots of a row whose queries each of ``num`` devices takes; t is a multiple of 128.
        num_heads: query heads of a device.
        block: queries and keys that are taken together; a power of two from 128 on, halved until it divides t.
    """
    block = math.gcd(block, places.shape[1])
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mha(
        masks.MultiHeadMask([splash_mask(places, window)] * num_heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=places.shape[0],
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )


def splash_mask(places: Int[np.ndarray, "num t"], window: int | None) -> masks.Mask:
    """Which keys the queries see, ``[T, T]``, without segments; the queries of one device after those of another."""
    shape = (places.size, places.size)
    mask = _Causal(shape) if window is None else _Local(shape, (window - 1, 0), 0)
    mask.q_sequence = places.reshape(-1)  # what it compares keys with
    return mask


class _ByBlocks:
    """Of a mask: blocks that are seen or hidden as a whole are known without comparing their entries.

    Each of (T / block)² blocks is asked for six times before the kernel is compiled.
    """

    q_sequence: np.ndarray
    reach = None  # how far back a query sees, itself not counted; None: to the beginning

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
