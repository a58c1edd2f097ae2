"""One attention function and the choice of the backend that computes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sft_jax.errors import UserError
from sft_jax.models.attention import cudnn, splash, triton
from sft_jax.models.attention.parity import WINDOW, check_parity
from sft_jax.models.attention.spec import AttentionSpec, Request
from sft_jax.models.attention.split import SplitRows
from sft_jax.models.attention.xla import xla_attention
from sft_jax.sharding import current_mesh, num_parts, partition_spec
from sft_jax.typing import Array, Float, Int

# In the order in which auto tries them: what is in a backend's way, and how it computes, for people.
_BACKENDS = {
    "splash": (splash.obstacle, "blocks of up to {block}"),
    "triton": (triton.obstacle, "blocks of documents only"),
    "cudnn": (cudnn.obstacle, "segments as a mask of T² bits"),
    "xla": (lambda request: None, "blocks of {block}"),
}
NAMES = tuple(_BACKENDS)
_PLATFORMS = {"splash": "tpu", "triton": "gpu", "cudnn": "gpu"}
CHECKED = ("triton", "cudnn")  # are compared with the xla backend before a run starts


@dataclass(frozen=True)
class Backend:
    """What computes attention."""

    name: str
    block: int  # queries and keys that are computed together, where that is ours to choose
    why: str = ""  # for people
    interpret: bool = False  # splash: run its operations one by one, on any device

    def __str__(self) -> str:
        return f"{self.name}{f' ({self.why})' if self.why else ''}"


SPLASH_BLOCK = 512  # at most
# Smaller blocks skip more where documents are short, larger ones keep wide units busy. Measured on a CPU: 64 and 128
# are alike for a document of 2,048, 64 is 1.6 times as fast for documents of 160.
XLA = Backend("xla", 64)
XLA_WIDE = Backend("xla", 256)


def any_length_backend(device: Any) -> Backend:
    """The backend that takes sequences of any length, for prompts and scoring."""
    return XLA if device.platform == "cpu" else XLA_WIDE


def choose_backend(requested: str, mesh: Mesh, specs: Sequence[AttentionSpec], dtype: str, length: int) -> Backend:
    """The fastest backend that can compute every attention layer of a model on these devices.

    Args:
        requested: ``auto``, or one of :data:`NAMES`, which is then used or refused.
        mesh: of the devices that the step is compiled for; they need not be there.
        specs: of the attention layers.
        dtype: of queries, keys and values.
        length: of a sequence; where there are several, what divides them all.

    Raises:
        UserError: the requested backend cannot compute this; with the reason.
    """
    device, parts = mesh.devices.flat[0], num_parts("length", mesh)
    requests = [Request(device, spec, dtype, length, parts) for spec in specs]
    obstacles = {
        name: next((found for request in requests if (found := obstacle(request))), None)
        for name, (obstacle, _) in _BACKENDS.items()
    }
    if requested != "auto" and obstacles[requested]:
        fitting = ", ".join(name for name in NAMES if not obstacles[name])
        raise UserError(f"model.attention: {requested} {obstacles[requested]}; here can be used: auto, {fitting}")
    name = requested if requested != "auto" else next(name for name in NAMES if not obstacles[name])
    block = any_length_backend(device).block if name == "xla" else SPLASH_BLOCK
    why = [_BACKENDS[name][1].format(block=block)]
    if parts > 1:
        why.append(f"sequences in {parts} parts, keys gathered")
    if name == "xla":
        passed = (other for other, platform in _PLATFORMS.items() if platform == device.platform and obstacles[other])
        why += [f"{other} {obstacles[other]}" for other in passed]
    return Backend(name, block, "; ".join(why))


def check_backend(backend: Backend, mesh: Mesh, specs: Sequence[AttentionSpec]) -> None:
    """Compare a backend of :data:`CHECKED`, on a device of this process, with the ``xla`` backend.

    Raises:
        UserError: it does not run, or is off by more than rounding.
    """
    if backend.name not in CHECKED:
        return
    compute = partial(_in_parts, backend, num_parts("length", mesh))
    instead = "cudnn" if backend.name == "triton" else "xla"
    kinds = {(one.group, one.head_dim, one.softcap, None if one.window is None else WINDOW) for one in specs}
    with jax.default_device(mesh.local_devices[0]):
        for group, head_dim, softcap, window in sorted(kinds, key=str):
            check_parity(backend.name, compute, group, head_dim, [window], softcap, instead=instead)


class _Scores(NamedTuple):
    """How scores are made, and what of its segment a query sees."""

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
    """What ``num`` devices would compute, one after the other; not of ``splash``."""
    scores = _Scores(window, softcap)
    if num == 1:
        return _compute(backend, scores, q, k, v, segment_ids)
    pairs = np.array_split(np.arange(q.shape[1], dtype=np.int32).reshape(-1, 2), num)
    places = [jnp.asarray(part.reshape(-1)) for part in pairs]
    out = [_compute(backend, scores, q[:, at], k, v, segment_ids, at) for at in places]
    return jnp.concatenate(out, axis=1)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    backend: Backend = XLA,
) -> Float[Array, "B T N H"]:
    """Softmax attention where position t sees s iff ``s <= t``, both are in one segment, and ``t - s < window``.

    Scores are ``scale · q · k``, by default ``1 / √H``, soft-capped if asked; softmax is float32. Query heads
    ``g·K … g·K + G`` share key/value head g (grouped-query attention, Ainslie et al. 2023). Segments are contiguous in
    their sequence. Each device computes its own sequences and heads, and where sequences are split as well, queries of
    its own against all keys and values, which are gathered for it. What padding (segment 0) sees is not specified.
    """
    mesh, scores = current_mesh(), _Scores(window, softcap, scale)
    if mesh is None:
        return _compute(backend, scores, q, k, v, segment_ids)
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
            partial(_compute, backend, scores),
            in_specs=(queries, keys, keys, rows),
            out_specs=queries,
            check_vma=False,
        )(q, k, v, segment_ids)

    assert isinstance(axis, str), axis
    parts = SplitRows.of(q.shape[1], mesh.shape[axis], axis, window)
    masks, where = None, None  # of splash: it has to know of each device's queries before it is compiled
    if backend.name == "splash":
        num_heads = q.shape[2] // (split if queries[2] else 1)
        masks = splash.make_kernel(parts.places(), num_heads, window, softcap, backend.block, backend.interpret)
        where = masks.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, axis)))

    def of_part(q: Array, k: Array, v: Array, segment_ids: Array, mask: Any) -> Array:
        q, k, v = parts.taken(q), parts.whole(k), parts.whole(v)
        return parts.given_back(_compute(backend, scores, q, k, v, segment_ids, parts.my_places(), mask))

    return jax.shard_map(of_part, in_specs=(queries, keys, keys, rows, where), out_specs=queries, check_vma=False)(
        q, k, v, segment_ids, masks
    )


def _compute(
    backend: Backend,
    scores: _Scores,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    places: Array | None = None,
    mask: Any = None,
) -> Array:
    """On one device; of the queries in these ``places`` of each sequence, where they are not all of them."""
    of_scores = scores._asdict()
    if backend.name == "splash":
        return splash.splash_attention(
            q,
            k,
            v,
            segment_ids,
            **of_scores,
            block=backend.block,
            interpret=backend.interpret,
            places=places,
            mask=mask,
        )
    if backend.name == "triton":
        assert places is None
        return triton.triton_attention(q, k, v, segment_ids, **of_scores)
    if backend.name == "cudnn":
        assert scores.softcap is None
        return cudnn.cudnn_attention(q, k, v, segment_ids, scores.window, scores.scale, places)
    return xla_attention(q, k, v, segment_ids, **of_scores, block=backend.block, places=places)
