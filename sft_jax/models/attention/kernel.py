"""One attention function and the choice of what computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sft_jax.architecture import Architecture
from sft_jax.errors import UserError
from sft_jax.models.attention.cudnn import cudnn_attention
from sft_jax.models.attention.mosaic_gpu import ROW_MULTIPLE, missing, mosaic_gpu_attention
from sft_jax.models.attention.parity import WINDOW, check_parity
from sft_jax.models.attention.splash import splash_attention
from sft_jax.models.attention.xla import xla_attention
from sft_jax.sharding import axis_names, current_mesh, partition_spec
from sft_jax.typing import Array, Float, Int

NAMES = ("splash", "cudnn", "mosaic_gpu", "xla")
# The order in which auto tries them. mosaic_gpu only compiled for a GPU so far and never ran on one: who wants it asks.
AUTO = ("splash", "cudnn", "xla")
CHECKED = ("cudnn", "mosaic_gpu")  # are compared with the xla kernel before a run starts


@dataclass(frozen=True)
class Kernel:
    """What computes attention."""

    name: str
    block: int  # queries and keys that are taken together, where that is ours to choose
    why: str = ""  # for people

    def __str__(self) -> str:
        return f"{self.name}{f' ({self.why})' if self.why else ''}"


# Smaller blocks skip more where documents are short, larger ones keep wide units busy. Measured on a CPU: 64 and 128
# are alike for a document of 2,048, 64 is 1.6 times as fast for documents of 160.
XLA = Kernel("xla", 64)
XLA_WIDE = Kernel("xla", 256)


def any_length_kernel(device: Any) -> Kernel:
    """The kernel that takes rows of any length, for prompts and scoring."""
    return XLA if device.platform == "cpu" else XLA_WIDE


def choose_kernel(
    requested: str, mesh: Mesh, arch: Architecture, dtype: str, row_length: int, softcap: float | None = None
) -> Kernel:
    """The fastest kernel that can express the mask of packed rows of this model on these devices.

    Args:
        requested: ``auto``, or one of :data:`NAMES`, which is then used or refused.
        mesh: of the devices that the step is compiled for; they need not be there.
        dtype: of queries, keys and values.
        row_length: slots of a row.

    Raises:
        UserError: the requested kernel cannot compute this; with the reason.
    """
    device = mesh.devices.flat[0]
    obstacles = {
        "splash": _against_splash(device, row_length),
        "cudnn": _against_cudnn(device, arch, dtype, row_length, softcap),
        "mosaic_gpu": _against_mosaic_gpu(device, arch, dtype, row_length),
        "xla": None,
    }
    if requested != "auto" and obstacles[requested]:
        fitting = ", ".join(name for name in NAMES if not obstacles[name])
        raise UserError(f"model.attention: {requested} {obstacles[requested]}; here can be used: auto, {fitting}")
    name = requested if requested != "auto" else next(name for name in AUTO if not obstacles[name])
    if name == "xla":
        passed = [f"{other} {obstacles[other]}" for other in AUTO if obstacles[other] and _is_for(other, device)]
        kernel = any_length_kernel(device)
        return Kernel("xla", kernel.block, f"blocks of {kernel.block}" + "".join(f"; {reason}" for reason in passed))
    block = next((size for size in (512, 256) if row_length % size == 0), 128)
    return Kernel(name, block, _HOW[name].format(block=block))


_HOW = {
    "splash": "blocks of {block}",
    "cudnn": "segments as a mask of T² bits",
    "mosaic_gpu": "segments as the first slot that each sees",
}


def check_kernel(kernel: Kernel, mesh: Mesh, arch: Architecture) -> None:
    """Compare a kernel of :data:`CHECKED`, on a device of this process, with the ``xla`` kernel.

    Raises:
        UserError: it does not run, or is off by more than rounding.
    """
    if kernel.name not in CHECKED:
        return
    windows = {None if window is None else WINDOW for window in arch.sliding_windows or (None,)}
    with jax.default_device(mesh.local_devices[0]):
        check_parity(
            kernel.name, partial(_compute, kernel), arch.num_heads // arch.num_kv_heads, arch.head_dim, list(windows)
        )


def _is_for(name: str, device: Any) -> bool:
    return {"splash": "tpu", "cudnn": "gpu"}.get(name) == device.platform


def _against_splash(device: Any, row_length: int) -> str | None:
    if device.platform != "tpu":
        return "needs a TPU"
    return f"needs rows of a multiple of 128, not {row_length} (data.max_length)" if row_length % 128 else None


def _against_cudnn(device: Any, arch: Architecture, dtype: str, row_length: int, softcap: float | None) -> str | None:
    if device.platform != "gpu":
        return "needs an NVIDIA GPU"
    if (capability := _capability(device)) is None or capability < 8.0:
        return "needs compute capability 8.0"
    if dtype != "bfloat16":
        return "needs bfloat16 (model.dtype)"
    if arch.head_dim % 8 or arch.head_dim > 128:
        return f"needs a head dimension up to 128, a multiple of 8, not {arch.head_dim}"
    if row_length % 2:
        return f"needs rows of an even number of slots, not {row_length} (data.max_length)"
    return "has no soft cap" if softcap is not None else None


def _against_mosaic_gpu(device: Any, arch: Architecture, dtype: str, row_length: int) -> str | None:
    capability = _capability(device) if device.platform == "gpu" else None
    if capability is None or not 9.0 <= capability < 11.0:
        return "needs a Hopper or Blackwell GPU of a data centre (compute capability 9 or 10)"
    if dtype != "bfloat16":
        return "needs bfloat16 (model.dtype)"
    if arch.head_dim % 8 or arch.head_dim > 256:
        return f"needs a head dimension up to 256, a multiple of 8, not {arch.head_dim}"
    if row_length % ROW_MULTIPLE:
        return f"needs rows of a multiple of {ROW_MULTIPLE}, not {row_length} (data.max_length)"
    return missing()


def _capability(device: Any) -> float | None:
    """The CUDA compute capability; None for GPUs of others, and for devices that are only compiled for."""
    try:
        return float(getattr(device, "compute_capability", ""))
    except ValueError:
        return None


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    window: int | None = None,
    softcap: float | None = None,
    kernel: Kernel = XLA,
) -> Float[Array, "B T N H"]:
    """Softmax attention where position t sees s iff ``s <= t``, both are in one segment, and ``t - s < window``.

    Scores are ``q · k / √H``, soft-capped if asked; softmax is float32. Query heads ``g·K … g·K + G`` share key/value
    head g (grouped-query attention, Ainslie et al. 2023). Segments are contiguous in their row. Each device computes
    its own rows and heads; positions are those of the row, which within a segment differ from those of the document by
    a constant. What padding (segment 0) sees is not specified.
    """

    def compute(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
        return _compute(kernel, q, k, v, segment_ids, window, softcap)

    mesh = current_mesh()
    if mesh is None:
        return compute(q, k, v, segment_ids)
    num_kv_heads, split = k.shape[2], math.prod(mesh.shape[name] for name in axis_names("heads", mesh))
    if num_kv_heads % split:  # each device gets the key/value heads of its query heads
        copies = math.lcm(num_kv_heads, split) // num_kv_heads
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
    queries = partition_spec(("batch", "length", "heads", "head_dim"), q.shape, mesh)
    keys = partition_spec(("batch", "length", "kv_heads", "head_dim"), k.shape, mesh)
    rows = partition_spec(("batch", "length"), segment_ids.shape, mesh)
    return jax.shard_map(compute, in_specs=(queries, keys, keys, rows), out_specs=queries, check_vma=False)(
        q, k, v, segment_ids
    )


def _compute(
    kernel: Kernel, q: Array, k: Array, v: Array, segment_ids: Array, window: int | None, softcap: float | None
) -> Array:
    if kernel.name == "splash":
        return splash_attention(q, k, v, segment_ids, window, softcap, kernel.block)
    if kernel.name == "cudnn":
        assert softcap is None
        return cudnn_attention(q, k, v, segment_ids, window)
    if kernel.name == "mosaic_gpu":
        return mosaic_gpu_attention(q, k, v, segment_ids, window, softcap)
    return xla_attention(q, k, v, segment_ids, window, softcap, kernel.block)
