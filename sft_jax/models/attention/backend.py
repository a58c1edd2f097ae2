"""The attention function, and the choice of its backend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sft_jax.errors import UserError
from sft_jax.models.attention import support
from sft_jax.models.attention.parity import WINDOW, check_compiles, check_parity
from sft_jax.models.attention.segments import chunk_segments
from sft_jax.models.attention.spec import AttentionSpec, Request
from sft_jax.models.attention.split import SplitSequences
from sft_jax.models.attention.xla import xla_attention
from sft_jax.sharding import current_mesh, num_parts, partition_spec
from sft_jax.typing import Array, Float, Int

# In the order in which auto tries them: the function that returns why a backend is unsupported, and a description.
_BACKENDS = {
    "splash": (support.splash, "blocks of up to {block}"),
    "triton": (support.triton, "blocks of documents only"),
    "cudnn": (support.cudnn, "segments as a mask of T² bits"),
    "xla": (lambda request: None, "blocks of {block}"),
}
NAMES = tuple(_BACKENDS)
_PLATFORMS = {"splash": "tpu", "triton": "gpu", "cudnn": "gpu"}
CHECKED = ("triton", "cudnn")  # backends that are compared with xla before a run starts


@dataclass(frozen=True)
class Backend:
    """An attention backend with its options."""

    name: str
    block: int  # block size in queries and keys, for splash and xla
    why: str = ""  # description of the choice, for messages
    interpret: bool = False  # splash: interpret the kernel, on any device

    def __str__(self) -> str:
        return f"{self.name}{f' ({self.why})' if self.why else ''}"


SPLASH_BLOCK = 512  # maximum
# Small blocks skip more for short documents, large blocks use wide compute units better. Measured on a CPU: 64 and 128
# are equally fast for a document of 2,048 tokens, and 64 is 1.6 times as fast for documents of 160.
XLA = Backend("xla", 64)
XLA_ACCELERATOR = Backend("xla", 256)


def any_length_backend(device: Any) -> Backend:
    """Returns the backend for sequences of any length, as in prompts and scoring."""
    return XLA if device.platform == "cpu" else XLA_ACCELERATOR


def choose_backend(
    requested: str,
    mesh: Mesh,
    specs: Sequence[AttentionSpec],
    dtype: str,
    length: int,
    deterministic: bool = False,
    refused: Mapping[str, str] | None = None,
) -> Backend:
    """Returns the fastest backend that supports every attention layer of a model on these devices.

    Args:
        requested: ``auto``, or the one of :data:`NAMES` to use.
        mesh: the mesh that the step is compiled for; its devices may be those of a topology.
        specs: the specs of the attention layers.
        dtype: dtype of queries, keys and values.
        length: the sequence length; for several lengths, their greatest common divisor.
        deterministic: leaves out backends whose result depends on timing.
        refused: backends that did not run on these devices, and why.

    Raises:
        UserError: the requested backend is not supported here; the message has the reason.
    """
    device, parts = mesh.devices.flat[0], num_parts("length", mesh)
    requests = [Request(device, spec, dtype, length, parts) for spec in specs]
    reasons = {
        name: next((reason for request in requests if (reason := unsupported_reason(request))), None)
        for name, (unsupported_reason, _) in _BACKENDS.items()
    }
    if deterministic and reasons["cudnn"] is None:
        reasons["cudnn"] = "adds gradients in any order, which training.deterministic excludes"
    reasons |= {name: f"does not run here: {reason}" for name, reason in (refused or {}).items()}
    if requested != "auto" and reasons[requested]:
        supported = ", ".join(name for name in NAMES if not reasons[name])
        raise UserError(f"model.attention: {requested} {reasons[requested]}; use one of auto, {supported}")
    name = requested if requested != "auto" else next(name for name in NAMES if not reasons[name])
    block = any_length_backend(device).block if name == "xla" else SPLASH_BLOCK
    why = [_BACKENDS[name][1].format(block=block)]
    if parts > 1:
        why.append(f"sequences in {parts} shards, keys all-gathered")
    if name == "xla":
        skipped = (other for other, platform in _PLATFORMS.items() if platform == device.platform and reasons[other])
        why += [f"{other} {reasons[other]}" for other in skipped]
    return Backend(name, block, "; ".join(why))


def check_backend(backend: Backend, mesh: Mesh, specs: Sequence[AttentionSpec], length: int) -> None:
    """Compares a backend of :data:`CHECKED` with the ``xla`` backend on a device of this process.

    The comparison is small. It is also compiled for sequences of ``length`` tokens, which it may refuse.

    Raises:
        Refused: the backend does not run.
        UserError: its error is larger than rounding.
    """
    if backend.name not in CHECKED:
        return
    compute = partial(_in_parts, backend, num_parts("length", mesh))
    fallback = "cudnn" if backend.name == "triton" else "xla"
    kinds = {(spec.group, spec.padded_head_dim, spec.softcap, WINDOW if spec.is_local else None) for spec in specs}
    with jax.default_device(mesh.local_devices[0]):
        for group, head_dim, softcap, window in sorted(kinds, key=str):
            check_parity(backend.name, compute, group, head_dim, [window], softcap, fallback=fallback)
        programs = {
            (spec.num_heads, spec.num_kv_heads, spec.padded_head_dim, spec.window, spec.softcap): spec for spec in specs
        }
        for spec in programs.values():
            check_compiles(backend.name, compute, spec, length, fallback)


class _Scores(NamedTuple):
    """The scaling, soft cap and sliding window of scores."""

    window: int | None
    softcap: float | None
    scale: float | None = None


def _in_parts(
    backend: Backend,
    num: int,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    window: int | None,
    softcap: float | None,
) -> Array:
    """Computes the parts of ``num`` devices one after the other; not for ``splash``."""
    scores = _Scores(window, softcap)
    if num == 1:
        return _compute(backend, scores, q, k, v, segment_ids)
    pairs = np.array_split(np.arange(q.shape[1], dtype=np.int32).reshape(-1, 2), num)
    positions = [jnp.asarray(part.reshape(-1)) for part in pairs]
    out = [_compute(backend, scores, q[:, part], k, v, segment_ids, positions=part) for part in positions]
    return jnp.concatenate(out, axis=1)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    segment_ids: Int[Array, "B T"],
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    backend: Backend = XLA,
    sinks: Float[Array, "N"] | None = None,
    chunk: int | None = None,
) -> Float[Array, "B T N Hv"]:
    """Softmax attention where position t sees s iff ``s <= t``, both are in one segment, and ``t - s < window``.

    Scores are ``scale · q · k`` with an optional soft cap; the default scale is ``1 / √H``. Softmax is float32. Query
    heads ``g·K … g·K + G`` share key/value head g (grouped-query attention, Ainslie et al. 2023). Segments are
    contiguous. Each device computes its own sequences and heads. If sequences are sharded too, keys and values are
    all-gathered, and each device computes its own queries. The output of padding (segment 0) is unspecified.

    Args:
        sinks: one more score for each query, of a key whose value is zero; not for ``cudnn``.
        chunk: the length of the chunks of a segment, which do not attend to each other; None for whole segments.
    """
    if chunk is not None and chunk < q.shape[1]:
        segment_ids = chunk_segments(segment_ids, chunk)
        # Implied by the segments, but a kernel skips the blocks outside of a window, and not those of other segments.
        window = chunk if window is None else min(window, chunk)
    mesh, scores = current_mesh(), _Scores(window, softcap, scale)
    if mesh is None:
        return _compute(backend, scores, q, k, v, segment_ids, sinks)
    num_kv_heads, shards = k.shape[2], num_parts("heads", mesh)
    if num_kv_heads % shards:  # each device gets the key/value heads of its query heads
        copies = math.lcm(num_kv_heads, shards) // num_kv_heads
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
    queries = partition_spec(("batch", "length", "heads", "head_dim"), q.shape, mesh)
    keys = partition_spec(("batch", "length", "kv_heads", "head_dim"), k.shape, mesh)
    segments = partition_spec(("batch", "unsplit_length"), segment_ids.shape, mesh)
    inputs = (queries, keys, keys, segments, None if sinks is None else PartitionSpec(queries[2]))
    axis = queries[1]
    if axis is None:
        return jax.shard_map(
            partial(_compute, backend, scores),
            in_specs=inputs,
            out_specs=queries,
            check_vma=False,
        )(q, k, v, segment_ids, sinks)

    assert isinstance(axis, str), axis
    split = SplitSequences.of(q.shape[1], mesh.shape[axis], axis, window)
    masks, mask_specs = None, None  # for splash, which needs the query positions of each device at compile time
    if backend.name == "splash":
        from sft_jax.models.attention import splash

        num_heads = q.shape[2] // (shards if queries[2] else 1)
        masks = splash.make_splash_kernel(
            split.positions(), num_heads, window, softcap, backend.block, backend.interpret
        )
        mask_specs = masks.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, axis)))

    def shard(q: Array, k: Array, v: Array, segment_ids: Array, sinks: Array | None, mask: Any) -> Array:
        q, k, v = split.redistribute(q), split.all_gather(k), split.all_gather(v)
        return split.restore(_compute(backend, scores, q, k, v, segment_ids, sinks, split.local_positions(), mask))

    return jax.shard_map(shard, in_specs=(*inputs, mask_specs), out_specs=queries, check_vma=False)(
        q, k, v, segment_ids, sinks, masks
    )


def _compute(
    backend: Backend,
    scores: _Scores,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    sinks: Array | None = None,
    positions: Array | None = None,
    mask: Any = None,
) -> Array:
    """Computes attention on one device, for the queries at ``positions`` of each sequence; None for all."""
    if q.shape[-1] != v.shape[-1] and backend.name in CHECKED:
        return _compute_padded(backend, scores, q, k, v, segment_ids, sinks, positions)
    options = scores._asdict()
    # A kernel is imported where it is used: its libraries take a while.
    if backend.name == "splash":
        from sft_jax.models.attention import splash

        return splash.splash_attention(
            q,
            k,
            v,
            segment_ids,
            **options,
            block=backend.block,
            interpret=backend.interpret,
            positions=positions,
            mask=mask,
            sinks=sinks,
        )
    if backend.name == "triton":
        from sft_jax.models.attention import triton

        assert positions is None
        return triton.triton_attention(q, k, v, segment_ids, **options, sinks=sinks)
    if backend.name == "cudnn":
        from sft_jax.models.attention import cudnn

        assert scores.softcap is None
        assert sinks is None
        return cudnn.cudnn_attention(q, k, v, segment_ids, scores.window, scores.scale, positions)
    return xla_attention(q, k, v, segment_ids, **options, block=backend.block, positions=positions, sinks=sinks)


def _compute_padded(backend: Backend, scores: _Scores, q: Array, k: Array, v: Array, *others: Any) -> Array:
    """Computes attention whose values have another head dimension, on a kernel with one for all.

    Zeros fill the smaller one. They change no score and no other output, but they are computed and stored: for queries
    and keys of 96 channels and values of 64, a fifth more products, and half as much memory again for the values.
    """
    scores = scores._replace(scale=q.shape[-1] ** -0.5 if scores.scale is None else scores.scale)
    size = max(q.shape[-1], v.shape[-1])
    padded = (jnp.pad(x, [(0, 0)] * 3 + [(0, size - x.shape[-1])]) for x in (q, k, v))
    return _compute(backend, scores, *padded, *others)[..., : v.shape[-1]]
