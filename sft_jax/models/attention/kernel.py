"""One attention function and the choice of what computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sft_jax.architecture import Architecture
from sft_jax.errors import UserError
from sft_jax.models.attention.cudnn import cudnn_attention
from sft_jax.models.attention.splash import splash_attention
from sft_jax.models.attention.xla import xla_attention
from sft_jax.sharding import axis_names, current_mesh, partition_spec
from sft_jax.typing import Array, Float, Int

NAMES = ("splash", "cudnn", "xla")  # the order in which they are tried


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
        "cudnn": _against_cudnn(device, arch, dtype, softcap),
        "xla": None,
    }
    if requested != "auto" and obstacles[requested]:
        fitting = ", ".join(name for name in NAMES if not obstacles[name])
        raise UserError(f"model.attention: {requested} {obstacles[requested]}; here can be used: auto, {fitting}")
    name = requested if requested != "auto" else next(name for name in NAMES if not obstacles[name])
    if name == "xla":
        passed = [f"{other} {why}" for other, why in obstacles.items() if why and _is_for(other, device)]
        kernel = any_length_kernel(device)
        return Kernel("xla", kernel.block, f"blocks of {kernel.block}" + "".join(f"; {reason}" for reason in passed))
    block = next((size for size in (512, 256) if row_length % size == 0), 128)
    return Kernel(name, block, f"blocks of {block}" if name == "splash" else "segments as a mask of T² bits")


def _is_for(name: str, device: Any) -> bool:
    return {"splash": "tpu", "cudnn": "gpu"}.get(name) == device.platform


def _against_splash(device: Any, row_length: int) -> str | None:
    if device.platform != "tpu":
        return "needs a TPU"
    return f"needs rows of a multiple of 128, not {row_length} (data.max_length)" if row_length % 128 else None


def _against_cudnn(device: Any, arch: Architecture, dtype: str, softcap: float | None) -> str | None:
    if device.platform not in ("gpu", "cuda"):
        return "needs an NVIDIA GPU"
    if float(getattr(device, "compute_capability", "0")) < 8.0:
        return "needs compute capability 8.0"
    if dtype != "bfloat16":
        return "needs bfloat16 (model.dtype)"
    if arch.head_dim % 8 or arch.head_dim > 128:
        return f"needs a head dimension up to 128, a multiple of 8, not {arch.head_dim}"
    return "has no soft cap" if softcap is not None else None


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
        if kernel.name == "splash":
            return splash_attention(q, k, v, segment_ids, window, softcap, kernel.block)
        if kernel.name == "cudnn":
            assert softcap is None
            return cudnn_attention(q, k, v, segment_ids, window)
        return xla_attention(q, k, v, segment_ids, window, softcap, kernel.block)

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
