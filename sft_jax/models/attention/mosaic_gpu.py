"""Hopper and Blackwell GPUs: tokamax's flash attention, a Mosaic GPU kernel that needs no mask of T² entries.

Its public function takes a mask as booleans only, so the operations behind it are used, of the one version that they
were read in. Nothing else of the library knows tokamax.
"""

from __future__ import annotations

import importlib.metadata
from functools import partial
from typing import Any

import jax

from sft_jax.models.attention.segments import first_visible
from sft_jax.models.remat import ATTENTION, keep
from sft_jax.typing import Array, Float, Int

VERSION = "0.0.12"
ROW_MULTIPLE = 128  # slots that its blocks of queries take


def mosaic_gpu_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    window: int | None = None,
    softcap: float | None = None,
    operation: Any = None,
) -> Float[Array, "B T N H"]:
    """See :func:`sft_jax.models.attention.kernel.attention`; on one device, 16-bit.

    T is a multiple of :data:`ROW_MULTIPLE`. The forward pass skips blocks before the segment and behind the query, the
    backward pass those behind the query only. Gradients of keys and values are made for each query head and then
    summed over its group: N and not K heads are in memory for that moment.

    Args:
        operation: of tokamax; by default its Mosaic GPU kernel. Its plain one takes the same mask on any device.
    """
    _leave_command_line_alone()
    return _attend(q, k, v, first_visible(segment_ids, window)[:, None], softcap, operation or _mosaic_gpu())


def missing() -> str | None:
    """What has to be installed; None where it is."""
    try:
        found = importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found == VERSION:
        return None
    return f"needs tokamax {VERSION}{f', not {found}' if found else ''} (pip install tokamax=={VERSION})"


def _leave_command_line_alone() -> None:
    """tokamax would read its settings from ``sys.argv``, where it stumbles over options that are not its own."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _mosaic_gpu() -> Any:
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention  # type: ignore

    return PallasMosaicGpuFlashAttention()


def _arguments(first: Int[Array, "B 1 T"], softcap: float | None) -> dict[str, Any]:
    from tokamax._src.ops.attention.base import Mask  # type: ignore

    return {"mask": Mask(is_causal=True, k_start=first), "logits_soft_cap": softcap}


# Differentiated here and not by tokamax, so that what its backward pass starts from has a name and can be kept.
@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Array, k: Array, v: Array, first: Array, softcap: float | None, operation: Any) -> Array:
    return operation(q, k, v, **_arguments(first, softcap))


def _forward(q: Array, k: Array, v: Array, first: Array, softcap: float | None, operation: Any):
    out, softmax = operation(q, k, v, **_arguments(first, softcap), return_residuals=True)
    out, softmax = jax.tree.map(lambda x: keep(x, ATTENTION), (out, softmax))
    return out, (q, k, v, first, out, softmax)


def _backward(softcap: float | None, operation: Any, residuals: Any, d_out: Array):
    q, k, v, first, out, softmax = residuals
    bound = operation.bind(q, k, v, **_arguments(first, softcap))
    gradients = operation.vjp(softmax, out, d_out, *bound.args, **bound.kwargs)
    return gradients["q"], gradients["k"], gradients["v"], None


_attend.defvjp(_forward, _backward)
