"""The gradient of a weight: a sum over the positions of all devices, each of which keeps its shard of the weight.

On TPUs the sum is a reduce-scatter in stages of four devices, written out. Left to itself the TPU compiler multiplies
in a ring: as many small products as devices, whose float32 sums are read and written each time. A reduce-scatter of
more devices it often turns into a sum of whole gradients, in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sft_jax.models import eight_bit
from sft_jax.models.eight_bit import EightBit
from sft_jax.sharding import current_mesh, partition_spec
from sft_jax.typing import Array, Float

_STAGE = 4  # devices
_PIECE = 2**25  # bytes


def weight_gradient(
    x: Float[Array, "*B *in"],
    dy: Float[Array, "*B *out"],
    num_in: int,
    num_out: int,
    embed: int | None = None,
    compute: EightBit | None = None,
) -> Float[Array, "in out"]:
    """Returns ``Σ x ⊗ dy`` over all positions, in float32.

    Args:
        num_in: the number of dimensions of the inputs.
        num_out: the number of dimensions of the outputs.
        embed: which dimension of the weight is sharded along the model dimension, 0 or 1; None for neither.
        compute: rounds the factors to eight bits.
    """
    multiply = partial(_product, num_in=num_in, num_out=num_out, compute=compute)
    if embed is None or x.ndim - num_in != 2:
        return multiply(x, dy)
    sums = _Sums.of(x.shape[:2], math.prod((x.shape[2:], dy.shape[2:])[embed]))
    if sums is None:
        return multiply(x, dy)
    return lax.platform_dependent(x, dy, tpu=partial(scattered, multiply, sums, embed), default=multiply)


def outer(x: Array, y: Array, num_x: int, num_y: int) -> Array:
    """Returns ``Σ x ⊗ y`` over all positions in float32; their last ``num_x`` and ``num_y`` dimensions are kept."""
    positions = tuple(range(x.ndim - num_x))
    assert x.shape[: x.ndim - num_x] == y.shape[: y.ndim - num_y]
    return lax.dot_general(x, y, ((positions, positions), ((), ())), preferred_element_type=jnp.float32)


def _product(x: Array, dy: Array, num_in: int, num_out: int, compute: EightBit | None) -> Float[Array, "in out"]:
    ins, outs = math.prod(x.shape[x.ndim - num_in :]), math.prod(dy.shape[dy.ndim - num_out :])
    if compute is None:
        return outer(x, dy, num_in, num_out).reshape(ins, outs)
    x, dy = x.reshape(*x.shape[: x.ndim - num_in], ins), dy.reshape(*dy.shape[: dy.ndim - num_out], outs)
    return eight_bit.rounded_outer(x, dy, compute)


class _Sums(NamedTuple):
    """How the products of devices are summed.

    Attributes:
        positions: how the positions ``[B, T]`` are sharded.
        scattered: the mesh axes that shard the gradient.
        others: the mesh axes that do not.
    """

    positions: PartitionSpec
    scattered: tuple[str, ...]
    others: tuple[str, ...]

    @classmethod
    def of(cls, positions: tuple[int, ...], size: int) -> _Sums | None:
        """For a model dimension of ``size``; None where the devices that shard it do not all have other positions."""
        mesh = current_mesh()
        if mesh is None:
            return None
        spec = partition_spec(("batch", "length"), positions, mesh)
        (kept,) = partition_spec(("embed",), (size,), mesh)
        summed = [name for part in spec for name in _names(part)]
        if kept is None or not set(_names(kept)) <= set(summed):
            return None
        return cls(spec, _names(kept), tuple(name for name in summed if name not in _names(kept)))


def scattered(
    multiply: Callable[[Array, Array], Array],
    sums: _Sums,
    embed: int,
    x: Float[Array, "B T *in"],
    dy: Float[Array, "B T *out"],
) -> Float[Array, "in out"]:
    """Returns the sum of ``multiply(x, dy)`` over devices, sharded along dimension ``embed``.

    Where the gradient of a device in float32 is larger than the operand with its other dimension, it is computed in
    pieces along that: with few positions, whole gradients would be most of the memory.
    """

    def summed(x: Array, dy: Array) -> Array:
        total = multiply(x, dy)
        for axis in sums.scattered:
            for groups in _stages(lax.axis_size(axis)):
                total = lax.psum_scatter(total, axis, scatter_dimension=embed, axis_index_groups=groups, tiled=True)
        return lax.psum(total, sums.others) if sums.others else total

    def shard(x: Array, dy: Array) -> Array:
        divided, totals = (dy, x)[embed], []
        size = 4 * math.prod(x.shape[2:]) * math.prod(dy.shape[2:])  # bytes
        least = 1 if size <= divided.nbytes else -(-size // _PIECE)
        num = next((n for n in range(least, divided.shape[2]) if divided.shape[2] % n == 0), divided.shape[2])
        for piece in jnp.split(divided, num, axis=2):
            if totals:  # one after the other; the compiler would multiply all of them first
                piece, totals[-1] = lax.optimization_barrier((piece, totals[-1]))
            totals.append(summed(x, piece) if embed == 0 else summed(piece, dy))
        return jnp.concatenate(totals, axis=1 - embed)

    out = PartitionSpec(*(sums.scattered if dim == embed else None for dim in range(2)))
    names = {*sums.scattered, *sums.others}
    return jax.shard_map(
        shard, in_specs=(sums.positions, sums.positions), out_specs=out, axis_names=names, check_vma=False
    )(x, dy)


def _stages(num: int) -> list[list[list[int]]]:
    """Returns the groups of devices of each stage, of which every device ends up with the shard of its index.

    Of eight devices: 0 2 4 6 and 1 3 5 7 sum quarters, then 0 1, 2 3, 4 5 and 6 7 halves of them.
    """
    stages, stride = [], num
    while stride > 1:
        size = math.gcd(stride, _STAGE) if stride % 2 == 0 else stride
        stride //= size
        starts = (device for device in range(num) if device // stride % size == 0)
        stages.append([[start + i * stride for i in range(size)] for start in starts])
    return stages


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else part
