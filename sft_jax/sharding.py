"""The mesh and the one table from logical axes to mesh axes.

Modules name what a dimension is (``embed``, ``heads``); only this file knows where it lives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sft_jax.errors import UserError
from sft_jax.typing import Array

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

# logical axis → mesh axis. Weights are split over fsdp and sequence along the model dimension, and over tensor along
# the dimension that heads, MLP channels or vocabulary entries live on. A batch is split over everything that is not
# tensor: its rows over data and fsdp, the slots of a row over sequence.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "replica": "data",  # rows while the model dimension is split over fsdp
    "embed_of_slots": "fsdp",  # the model dimension while slots are split already and rows are not
    "length": "sequence",
    "whole_length": None,  # where the model dimension is split over sequence, and where each device sees whole rows
    "activation": None,
    "layers": None,
    "embed": ("fsdp", "sequence"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": None,
    "vocab": "tensor",
    "head_vocab": ("fsdp", "sequence", "tensor"),  # where logits are made, with the model dimension whole
    # of an adapter's matrices, whose moments and gradients would otherwise be whole on every device of fsdp × sequence
    "adapter_embed": ("fsdp", "sequence"),
    "adapter_heads": ("tensor", "fsdp", "sequence"),
    "adapter_kv_heads": ("tensor", "fsdp", "sequence"),
    "adapter_mlp": ("tensor", "fsdp", "sequence"),
    "rank": None,
    "norm": None,
}


def make_mesh(
    data: int = 1, fsdp: int = -1, sequence: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes :data:`MESH_AXES`; one size may be -1 and takes all remaining devices.

    Devices of a TPU slice are arranged so that neighbours in the mesh are neighbours in the machine. Several slices
    meet along ``data`` only, whose one exchange a step the network between them can carry.

    Raises:
        UserError: the sizes do not multiply to the number of devices, or ``data`` does not to the number of slices.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = [data, fsdp, sequence, tensor]
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if math.prod(sizes) != len(devices):
        named = " × ".join(f"{name} {size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        raise UserError(f"mesh: {named} needs {math.prod(sizes)} devices, {len(devices)} are here; -1 infers one axis")
    return Mesh(_arranged(devices, sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arranged(devices: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    """Devices as an array of the mesh's shape."""
    if devices[0].platform == "gpu":  # whose runtime calls each host a slice; the outer axes are to cross hosts
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        return np.asarray(devices).reshape(sizes)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data, *rest = sizes
    if data % num_slices:
        raise UserError(
            f"mesh.data: {data} is not a multiple of the {num_slices} slices, and only data may cross from one to "
            f"another; use mesh.data={num_slices} mesh.fsdp=-1"
        )
    within = (data // num_slices, *rest)
    return mesh_utils.create_hybrid_device_mesh(
        within, (num_slices, *(1 for _ in rest)), devices, allow_split_physical_axes=True
    )


def check_batch(batch_size: int, parts: int, mesh: Mesh) -> None:
    """Refuse a batch whose rows, cut into ``parts``, do not divide over the devices.

    Raises:
        UserError: with the sizes that do.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size // parts % shards:
        raise UserError(
            f"training.batch_size: {batch_size} rows in {parts} part(s) do not divide over the {shards} devices of "
            f"data × fsdp; use a multiple of {shards * parts}"
        )


def check_lengths(row_lengths: Sequence[int], mesh: Mesh) -> None:
    """Refuse a sequence axis that does not divide the slots of every row.

    Args:
        row_lengths: all that come, the longest last.

    Raises:
        UserError: with the sizes that do.
    """
    sequence, common = mesh.shape["sequence"], math.gcd(*row_lengths)
    if common % sequence:
        rows = " or ".join(map(str, row_lengths))
        raise UserError(
            f"mesh.sequence: {sequence} does not divide rows of {rows} slots (data.max_length"
            f"{'' if len(row_lengths) == 1 else ' without data.packing'}); these do: {_divisors(common)}"
        )


def check_heads(specs: Sequence[Any], mesh: Mesh) -> None:
    """Refuse a tensor axis that would cut through a head of an attention layer.

    Raises:
        UserError: with the sizes that do not.
    """
    tensor = mesh.shape["tensor"]
    heads = num_heads(specs)
    if heads % tensor:
        raise UserError(f"mesh.tensor: {tensor} does not divide the {heads} heads; these do: {_divisors(heads)}")


def num_heads(specs: Sequence[Any]) -> int:
    """The query heads of attention layers; where they differ, what divides them all."""
    return math.gcd(*(spec.num_heads for spec in specs))


def _divisors(size: int) -> str:
    return ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)


def partition_spec(axes: Sequence[str], shape: Sequence[int], mesh: Mesh | jax.sharding.AbstractMesh) -> PartitionSpec:
    """Where each dimension lives: on those of its mesh axes, from the first on, whose devices divide it.

    ``axes`` may be one shorter than ``shape``: stacked decoder layers carry one leading dimension more.
    """
    axes = ("layers",) * (len(shape) - len(axes)) + tuple(axes)
    assert len(axes) == len(shape), (axes, shape)
    placed = []
    for axis, size in zip(axes, shape, strict=True):
        names = axis_names(axis, mesh)
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        placed.append(names)
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in placed))


def named_sharding(mesh: Mesh, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """:func:`partition_spec` on a concrete mesh."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def bytes_per_device(tree: Any) -> int:
    """What a device holds of some leaves, abstract or not, that have shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh of ``jax.set_mesh``; None outside, and on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def axis_names(axis: str, mesh: Mesh | jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that a logical axis is split over, without those of size 1."""
    names = RULES[axis] or ()
    return tuple(name for name in ((names,) if isinstance(names, str) else names) if mesh.shape[name] > 1)


def num_parts(axis: str, mesh: Mesh | jax.sharding.AbstractMesh) -> int:
    """How many parts a logical axis is split into, where it divides."""
    return math.prod(mesh.shape[name] for name in axis_names(axis, mesh))


def constrain(x: Array, *axes: str) -> Array:
    """Tell the compiler where an intermediate lives; a no-op outside ``jax.set_mesh``."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))
