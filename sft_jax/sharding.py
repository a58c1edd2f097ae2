"""The device mesh, and the table that maps logical axes to mesh axes.

Modules name a dimension by its logical axis (``embed``, ``heads``). Only this file maps it to mesh axes.
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

# Logical axis → mesh axes. Weights are sharded over fsdp and sequence along the model dimension, and over tensor along
# the dimension of heads, MLP channels or vocabulary entries. A batch is sharded over all axes but tensor: its sequences
# over data and fsdp, the tokens of a sequence over sequence.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "replica": "data",  # sequences, where the model dimension is sharded over fsdp
    "embed_fsdp": "fsdp",  # the model dimension, where the length is sharded and the batch is not yet
    "length": "sequence",
    "unsplit_length": None,  # where the model dimension is sharded over sequence, or each device needs whole sequences
    "activation": None,
    "layers": None,
    "embed": ("fsdp", "sequence"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "recurrent_heads": ("tensor", "sequence"),  # of a recurrence, which needs whole sequences
    "latent": None,  # the compressed queries, keys and values of latent attention, where they are an output
    "mlp": "tensor",
    "router": None,
    "experts": ("tensor", "fsdp"),
    "expert_in": ("fsdp", "sequence"),  # without those that shard the experts
    "expert_mlp": ("fsdp", "sequence"),  # the inputs of the second linear layer of an expert
    "expert_out": None,
    "vocab": "tensor",
    "head_vocab": ("fsdp", "sequence", "tensor"),  # where logits are computed; the model dimension is not sharded
    # Adapter matrices. Otherwise their moments and gradients would be replicated over fsdp × sequence.
    "adapter_embed": ("fsdp", "sequence"),
    "adapter_heads": ("tensor", "fsdp", "sequence"),
    "adapter_kv_heads": ("tensor", "fsdp", "sequence"),
    "adapter_latent": ("tensor", "fsdp", "sequence"),
    "adapter_mlp": ("tensor", "fsdp", "sequence"),
    "adapter_router": None,
    "adapter_expert_in": ("fsdp", "sequence"),
    "adapter_expert_mlp": ("fsdp", "sequence"),
    "adapter_expert_out": ("fsdp", "sequence"),
    "rank": None,
    "norm": None,
}


def make_mesh(
    data: int = 1, fsdp: int = -1, sequence: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Creates a mesh with the axes :data:`MESH_AXES`; one size may be -1 and takes all remaining devices.

    Neighbors in the mesh are neighbors in the topology of a TPU slice. Only ``data`` crosses slices: it needs one
    all-reduce per step, which the network between slices can carry.

    Raises:
        UserError: the product of the sizes is not the number of devices, or ``data`` is not a multiple of the number
            of slices.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = [data, fsdp, sequence, tensor]
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if math.prod(sizes) != len(devices):
        named = " × ".join(f"{name} {size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        there = f"there {'is' if len(devices) == 1 else 'are'} {len(devices)}"
        raise UserError(f"mesh: {named} needs {math.prod(sizes)} devices, but {there}; -1 infers one axis")
    return Mesh(_arrange_devices(devices, sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arrange_devices(devices: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    """Returns the devices as an array of the mesh's shape."""
    if devices[0].platform == "gpu":  # the GPU runtime reports each host as a slice; let the outer axes cross hosts
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        return np.asarray(devices).reshape(sizes)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data, *rest = sizes
    if data % num_slices:
        raise UserError(
            f"mesh.data: {data} is not a multiple of the {num_slices} slices, and only data may cross slices; "
            f"use mesh.data={num_slices} mesh.fsdp=-1"
        )
    within = (data // num_slices, *rest)
    return mesh_utils.create_hybrid_device_mesh(
        within, (num_slices, *(1 for _ in rest)), devices, allow_split_physical_axes=True
    )


def check_batch(batch_size: int, num_microbatches: int, mesh: Mesh) -> None:
    """Checks that the sequences of each microbatch divide over the devices.

    Raises:
        UserError: they do not; the message names a size that does.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size // num_microbatches % shards:
        raise UserError(
            f"training.batch_size: {batch_size} sequences in {num_microbatches} microbatch(es) do not divide over the "
            f"{shards} devices of data × fsdp; use a multiple of {shards * num_microbatches}"
        )


def check_lengths(sequence_lengths: Sequence[int], mesh: Mesh) -> None:
    """Checks that ``mesh.sequence`` divides every sequence length.

    Args:
        sequence_lengths: all sequence lengths of the run, the longest last.

    Raises:
        UserError: it does not; the message names the sizes that do.
    """
    sequence, common = mesh.shape["sequence"], math.gcd(*sequence_lengths)
    if common % sequence:
        rows = " or ".join(map(str, sequence_lengths))
        raise UserError(
            f"mesh.sequence: {sequence} does not divide sequences of {rows} tokens (data.max_length"
            f"{'' if len(sequence_lengths) == 1 else ' without data.packing'}); these do: {_divisors(common)}"
        )


def check_heads(specs: Sequence[Any], mesh: Mesh) -> None:
    """Checks that ``mesh.tensor`` divides the query heads of every attention layer.

    Raises:
        UserError: it does not; the message names the sizes that do.
    """
    tensor = mesh.shape["tensor"]
    heads = num_heads(specs)
    if heads % tensor:
        raise UserError(f"mesh.tensor: {tensor} does not divide the {heads} heads; these do: {_divisors(heads)}")


def num_heads(specs: Sequence[Any]) -> int:
    """Returns the number of query heads; if layers differ, the greatest common divisor."""
    return math.gcd(*(spec.num_heads for spec in specs))


def _divisors(size: int) -> str:
    return ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)


def partition_spec(axes: Sequence[str], shape: Sequence[int], mesh: Mesh | jax.sharding.AbstractMesh) -> PartitionSpec:
    """Returns the partition spec of an array with these logical axes.

    Each dimension is sharded over the longest prefix of its mesh axes whose devices divide it, without the axes of the
    dimensions before it. ``axes`` may be shorter
    than ``shape``: the parameters of stacked layers have leading dimensions.
    """
    axes = ("layers",) * (len(shape) - len(axes)) + tuple(axes)
    assert len(axes) == len(shape), (axes, shape)
    placed: list[tuple[str, ...]] = []
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(name for name in axis_names(axis, mesh) if not any(name in others for others in placed))
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        placed.append(names)
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in placed))


def named_sharding(mesh: Mesh, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """:func:`partition_spec` on a concrete mesh."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree of arrays, or abstract arrays, with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """Returns the mesh of ``jax.set_mesh``; None outside of it and on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def axis_names(axis: str, mesh: Mesh | jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """Returns the mesh axes that a logical axis is sharded over, without those of size 1."""
    names = RULES[axis] or ()
    return tuple(name for name in ((names,) if isinstance(names, str) else names) if mesh.shape[name] > 1)


def num_parts(axis: str, mesh: Mesh | jax.sharding.AbstractMesh) -> int:
    """Returns the number of shards of a logical axis whose size they divide."""
    return math.prod(mesh.shape[name] for name in axis_names(axis, mesh))


def constrain(x: Array, *axes: str) -> Array:
    """Constrains the sharding of an intermediate array; a no-op outside ``jax.set_mesh``."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))
