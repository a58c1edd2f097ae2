"""One attention function and the choice of what computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sft_jax.architecture import Architecture
from sft_jax.errors import UserError
from sft_jax.models.attention.cudnn import cudnn_attention
from sft_jax.models.attention.mosaic_gpu import ROW_MULTIPLE, missing, mosaic_gpu_attention
from sft_jax.models.attention.parity import WINDOW, check_parity
from sft_jax.models.attention.splash import make_kernel, splash_attention
from sft_jax.models.attention.split import SplitRows
from sft_jax.models.attention.triton import ROW_MULTIPLE as TRITON_ROW_MULTIPLE
from sft_jax.models.attention.triton import triton_attention
from sft_jax.models.attention.xla import xla_attention
from sft_jax.sharding import current_mesh, num_parts, partition_spec
from sft_jax.typing import Array, Float, Int

NAMES = ("splash", "triton", "cudnn", "mosaic_gpu", "xla")
# The order in which auto tries them. mosaic_gpu only compiled for a GPU so far and never ran on one: who wants it asks.
AUTO = ("splash", "triton", "cudnn", "xla")
CHECKED = ("triton", "cudnn", "mosaic_gpu")  # are compared with the xla kernel before a run starts


@dataclass(frozen=True)
class Kernel:
    """What computes attention."""

    name: str
    block: int  # queries and keys that are taken together, where that is ours to choose
    why: str = ""  # for people
    interpret: bool = False  # splash: run its operations one by one, on any device

    def __str__(self) -> str:
        return f"{self.name}{f' ({self.why})' if self.why else ''}"


SPLASH_BLOCK = 512  # at most
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
        row_length: slots of a row; of rows of several lengths, what divides them all.

    Raises:
        UserError: the requested kernel cannot compute this; with the reason.
    """
    device, parts = mesh.devices.flat[0], num_parts("length", mesh)
    obstacles = {
        "splash": _against_splash(device, row_length, parts),
        "triton": _against_triton(device, arch, dtype, row_length, parts),
        "cudnn": _against_cudnn(device, arch, dtype, row_length, parts, softcap),
        "mosaic_gpu": _against_mosaic_gpu(device, arch, dtype, row_length, parts),
        "xla": None,
    }
    if requested != "auto" and obstacles[requested]:
        fitting = ", ".join(name for name in NAMES if not obstacles[name])
        raise UserError(f"model.attention: {requested} {obstacles[requested]}; here can be used: auto, {fitting}")
    name = requested if requested != "auto" else next(name for name in AUTO if not obstacles[name])
    if name == "xla":
        passed = [f"{other} {obstacles[other]}" for other in AUTO if obstacles[other] and _is_for(other, device)]
        kernel = any_length_kernel(device)
        why = [f"blocks of {kernel.block}", *_how_split(parts), *passed]
        return Kernel("xla", kernel.block, "; ".join(why))
    why = [_HOW[name].format(block=SPLASH_BLOCK), *_how_split(parts)]
    return Kernel(name, SPLASH_BLOCK, "; ".join(why))


def _how_split(parts: int) -> list[str]:
    return [f"rows in {parts} parts, keys gathered"] if parts > 1 else []


_HOW = {
    "splash": "blocks of up to {block}",
    "triton": "blocks of documents only",
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
    compute = partial(_in_parts, kernel, num_parts("length", mesh))
    with jax.default_device(mesh.local_devices[0]):
        group, instead = arch.num_heads // arch.num_kv_heads, "cudnn" if kernel.name == "triton" else "xla"
        check_parity(kernel.name, compute, group, arch.head_dim, list(windows), instead=instead)


def _in_parts(
    kernel: Kernel,
    num: int,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    window: int | None,
    softcap: float | None,
) -> Array:
    """What ``num`` devices would compute, one after the other; not of ``splash``."""
    if num == 1:
        return _compute(kernel, q, k, v, segment_ids, window, softcap)
    pairs = np.array_split(np.arange(q.shape[1], dtype=np.int32).reshape(-1, 2), num)
    places = [jnp.asarray(part.reshape(-1)) for part in pairs]
    out = [_compute(kernel, q[:, at], k, v, segment_ids, window, softcap, at) for at in places]
    return jnp.concatenate(out, axis=1)


def _is_for(name: str, device: Any) -> bool:
    return {"splash": "tpu", "triton": "gpu", "cudnn": "gpu"}.get(name) == device.platform


def _against_splash(device: Any, row_length: int, parts: int) -> str | None:
    if device.platform != "tpu":
        return "needs a TPU"
    return _against_length(row_length, 128, parts)


def _against_length(row_length: int, multiple: int, parts: int) -> str | None:
    if row_length % (multiple * parts) == 0:
        return None
    where = "data.max_length" if parts == 1 else f"data.max_length, in {parts} parts by mesh.sequence"
    return f"needs rows of a multiple of {multiple * parts}, not {row_length} ({where})"


def _against_16_bits(device: Any, dtype: str) -> str | None:
    """Of kernels for NVIDIA GPUs that have 16-bit units."""
    if device.platform != "gpu":
        return "needs an NVIDIA GPU"
    if (capability := _capability(device)) is None or capability < 8.0:
        return "needs compute capability 8.0"
    return None if dtype == "bfloat16" else "needs bfloat16 (model.dtype)"


def _against_triton(device: Any, arch: Architecture, dtype: str, row_length: int, parts: int) -> str | None:
    if obstacle := _against_16_bits(device, dtype):
        return obstacle
    if arch.head_dim not in (16, 32, 64, 128):
        return f"needs a head dimension of 16, 32, 64 or 128, not {arch.head_dim}"
    if parts > 1:
        return "takes whole rows only, and mesh.sequence splits them"
    return _against_length(row_length, TRITON_ROW_MULTIPLE, parts)


def _against_cudnn(
    device: Any, arch: Architecture, dtype: str, row_length: int, parts: int, softcap: float | None
) -> str | None:
    if obstacle := _against_16_bits(device, dtype):
        return obstacle
    if arch.head_dim % 8 or arch.head_dim > 128:
        return f"needs a head dimension up to 128, a multiple of 8, not {arch.head_dim}"
    return "has no soft cap" if softcap is not None else _against_length(row_length, 2, parts)


def _against_mosaic_gpu(device: Any, arch: Architecture, dtype: str, row_length: int, parts: int) -> str | None:
    capability = _capability(device) if device.platform == "gpu" else None
    if capability is None or not 9.0 <= capability < 11.0:
        return "needs a Hopper or Blackwell GPU of a data centre (compute capability 9 or 10)"
    if dtype != "bfloat16":
        return "needs bfloat16 (model.dtype)"
    if arch.head_dim % 8 or arch.head_dim > 256:
        return f"needs a head dimension up to 256, a multiple of 8, not {arch.head_dim}"
    if parts > 1:
        return "takes whole rows only, and mesh.sequence splits them"
    return _against_length(row_length, ROW_MULTIPLE, parts) or missing()


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
    its own rows and heads, and where rows are split as well, queries of its own against all keys and values, which are
    gathered for it; positions are those of the row, which within a segment differ from those of the document by a
    constant. What padding (segment 0) sees is not specified.
    """
    mesh = current_mesh()
    if mesh is None:
        return _compute(kernel, q, k, v, segment_ids, window, softcap)
    num_kv_heads, split = k.shape[2], num_parts("heads", mesh)
    if num_kv_heads % split:  # each device gets the key/value heads of its query heads
        copies = math.lcm(num_kv_heads, split) // num_kv_heads
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
    queries = partition_spec(("batch", "length", "heads", "head_dim"), q.shape, mesh)
    keys = partition_spec(("batch", "length", "kv_heads", "head_dim"), k.shape, mesh)
    rows = partition_spec(("batch", "whole_length"), segment_ids.shape, mesh)
    axis = queries[1]
    if axis is None:
        return jax.shard_map(
            partial(_compute, kernel, window=window, softcap=softcap),
            in_specs=(queries, keys, keys, rows),
            out_specs=queries,
            check_vma=False,
        )(q, k, v, segment_ids)

    assert isinstance(axis, str), axis
    parts = SplitRows.of(q.shape[1], mesh.shape[axis], axis, window)
    masks, where = None, None  # of splash: it has to know of each device's queries before it is compiled
    if kernel.name == "splash":
        num_heads = q.shape[2] // (split if queries[2] else 1)
        masks = make_kernel(parts.places(), num_heads, window, softcap, kernel.block, kernel.interpret)
        where = masks.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, axis)))

    def of_part(q: Array, k: Array, v: Array, segment_ids: Array, mask: Any) -> Array:
        q, k, v = parts.taken(q), parts.whole(k), parts.whole(v)
        return parts.given_back(_compute(kernel, q, k, v, segment_ids, window, softcap, parts.my_places(), mask))

    return jax.shard_map(of_part, in_specs=(queries, keys, keys, rows, where), out_specs=queries, check_vma=False)(
        q, k, v, segment_ids, masks
    )


def _compute(
    kernel: Kernel,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    window: int | None,
    softcap: float | None,
    places: Array | None = None,
    mask: Any = None,
) -> Array:
    """On one device; of the queries in these ``places`` of each row, where they are not all of them."""
    if kernel.name == "splash":
        return splash_attention(q, k, v, segment_ids, window, softcap, kernel.block, kernel.interpret, places, mask)
    if kernel.name == "triton":
        assert places is None
        return triton_attention(q, k, v, segment_ids, window, softcap)
    if kernel.name == "cudnn":
        assert softcap is None
        return cudnn_attention(q, k, v, segment_ids, window, places)
    if kernel.name == "mosaic_gpu":
        assert places is None
        return mosaic_gpu_attention(q, k, v, segment_ids, window, softcap)
    return xla_attention(q, k, v, segment_ids, window, softcap, kernel.block, places)
