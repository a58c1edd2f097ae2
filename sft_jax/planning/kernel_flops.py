"""FLOPs of Pallas kernels, for which the TPU compiler estimates no cycles."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

import numpy as np

from sft_jax.planning.hlo import Computation, Instruction

# Products of a kernel [T, S]: how many contract or write the head dim of queries and keys, and how many that of values.
_QK_AND_V = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2), "fused": (3, 2)}
_LENGTH_MINOR = 2  # layout [H, T] instead of [T, H]
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_FLOPS = re.compile(r'"cost_estimate":\{[^}]*"flops":"?([\d.e+]+)')
_METADATA = re.compile(r'"xprof_metadata":"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class KernelFlops:
    """What a kernel multiplies.

    Attributes:
        flops: on one device; a multiply-add is two.
        is_attention: whether it mixes tokens.
        share: fraction of the scores ``[T, S]`` in the blocks that it computes; 1 for other kernels.
    """

    flops: float
    is_attention: bool
    share: float = 1.0


def kernel_flops(computation: Computation, kernel: Instruction) -> KernelFlops | None:
    """FLOPs of a Pallas kernel (``tpu_custom_call``): splash attention by its blocks, others by ``cost_estimate``.

    None for a kernel without either.

    Splash attention is taken to be causal. Its block sizes are in the text.
    """
    name = _SPLASH.search(kernel.text)
    if name is not None and (found := _splash(computation, kernel, name[1])) is not None:
        return found
    estimate = _FLOPS.search(kernel.text)
    if estimate is None:
        return None
    return KernelFlops(
        float(estimate[1]), is_attention="attention" in kernel.text[: kernel.text.find("backend_config")]
    )


def _splash(computation: Computation, kernel: Instruction, phase: str) -> KernelFlops | None:
    """Queries ``[…, N, T, H]``, keys ``[…, K, S, H]`` and values ``[…, K, S, Hv]`` are its first floating operands."""
    floating, tables = [], []
    for at in range(len(kernel.operands)):
        made = computation.operand(kernel, at)
        if made is None or not made.arrays:
            return None
        dtype, sizes = made.arrays[0]
        if dtype.startswith(("bf", "f")) and len(sizes) >= 2:
            floating.append(sizes)
        elif len(sizes) == 3:
            tables.append(sizes)
    if len(floating) < 3:
        return None
    blocks = _metadata(kernel)
    queries, keys, values = (
        _head_dim_last(sizes, blocks.get(f"{name}_layout")) for name, sizes in zip("qkv", floating, strict=False)
    )
    if phase == "dkv" and any(len(sizes) > len(queries) for _, sizes in kernel.arrays):
        phase = "fused"  # it also writes the partial gradients of the queries, one for each block of keys
    suffix = "" if phase == "fwd" else "_dq" if phase == "dq" else "_dkv"
    rows, columns = queries[-2], keys[-2]
    block = (int(blocks.get(f"block_q{suffix}", rows)), int(blocks.get(f"block_kv{suffix}", columns)))
    grid = tables[0][-2:] if tables else (rows, columns)  # of a sliding window, smaller than the blocks
    share = causal_share(rows, columns, block, **({"height": grid[0]} if phase == "dkv" else {"width": grid[1]}))
    of_keys, of_values = _QK_AND_V[phase]
    pairs = math.prod(queries[:-2]) * rows * columns
    return KernelFlops(2.0 * pairs * share * (of_keys * queries[-1] + of_values * values[-1]), True, share)


def causal_share(
    rows: int, columns: int, block: tuple[int, int], width: int | None = None, height: int | None = None
) -> float:
    """Fraction of the scores ``[rows, columns]`` in blocks that causal attention computes.

    Args:
        rows: queries; where they are fewer than the keys, they are a part of the sequence, spread over all of it.
        block: block sizes in queries and keys.
        width: blocks of keys that the kernel visits for a block of queries, at most.
        height: blocks of queries that it visits for a block of keys, at most.

    >>> causal_share(2048, 2048, (512, 512))  # 1 + 2 + 3 + 4 of 16 blocks
    0.625
    >>> causal_share(2048, 2048, (512, 512), width=2)  # 1 + 2 + 2 + 2
    0.4375
    """
    of_rows, of_columns = -(-rows // block[0]), -(-columns // block[1])
    last = (np.arange(of_rows) + 1) * block[0] * columns / rows  # the position behind each block of queries
    computed = np.arange(of_columns)[None, :] * block[1] < last[:, None]
    if height is not None:
        return float(np.minimum(computed.sum(0), height).sum()) / computed.size
    return float(np.minimum(computed.sum(1), of_columns if width is None else width).sum()) / computed.size


def _head_dim_last(sizes: tuple[int, ...], layout: int | None) -> tuple[int, ...]:
    return (*sizes[:-2], sizes[-1], sizes[-2]) if layout == _LENGTH_MINOR else sizes


def _metadata(kernel: Instruction) -> dict[str, int]:
    match = _METADATA.search(kernel.text)
    return json.loads(json.loads(f'"{match[1]}"')) if match else {}
