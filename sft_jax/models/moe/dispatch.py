"""Brings tokens and the weights of their experts together, on one device or on a mesh.

The experts of a layer are sharded over ``tensor``, where tokens are replicated, and over ``fsdp``, where they are not.
Either each device gathers the weights of all experts, as for other weights, or it gathers the tokens of all devices,
applies its own experts to them, and scatters the sums. :func:`moves_tokens` picks what moves fewer bytes.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sft_jax.models.context import Context
from sft_jax.models.moe.products import ExpertMatrix
from sft_jax.models.moe.rows import Compute, Rows, through_experts
from sft_jax.models.quantized import QuantizedMatrix
from sft_jax.sharding import current_mesh, partition_spec
from sft_jax.typing import Array, Float, Int

WEIGHT_AXES = ("experts", "expert_in", "expert_out")
_FEWEST_ROWS = 512  # computed at a time


def dispatch(
    compute: Compute,
    matrices: tuple[ExpertMatrix, ...],
    tokens: Float[Array, "B T D"],
    chosen: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    num_experts: int,
    context: Context,
) -> Float[Array, "B T D"]:
    """Returns ``Σ weight · expert(token)`` over the chosen experts of each token. No token is dropped."""
    weights, mesh = weights.astype(tokens.dtype), current_mesh()
    if mesh is None:
        x, w, c = (one.reshape(-1, one.shape[-1]) for one in (tokens, weights, chosen))
        return through_experts(Rows(compute, None), x, w, matrices, c, 0, num_experts).reshape(tokens.shape)

    specs = jax.tree.map(lambda axes, array: partition_spec(axes, array.shape, mesh), _axes(matrices), matrices,
                         is_leaf=_is_axes)  # fmt: skip
    token_spec = PartitionSpec(*partition_spec(context.stream[:2], tokens.shape[:2], mesh), None)
    of_experts = names_of(partition_spec(WEIGHT_AXES, (num_experts, 1, 1), mesh)[0])
    exchanged = tuple(name for name in of_experts if name != "tensor")
    sharded = names_of(token_spec[0])
    of_weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves([one.weight for one in matrices]))
    moves = bool(exchanged) and (
        context.weight_stationary or moves_tokens(of_weights, tokens.shape, tokens.dtype.itemsize, exchanged, mesh)
    )
    keep = of_experts if moves else tuple(name for name in of_experts if name == "tensor")
    gathered = tuple(name for name in exchanged if moves and name in sharded)

    def local(tokens: Array, weights: Array, chosen: Array, matrices: Any) -> Array:
        matrices = jax.tree.map(lambda array, spec: _gather(array, spec, keep), matrices, specs)
        x, w, c = (one.reshape(-1, one.shape[-1]) for one in (tokens, weights, chosen))
        out: Any
        if gathered:
            both: Any = [_all_gather(one, gathered) for one in (x, w)]
            x, w = both
            c = lax.all_gather(c, gathered, tiled=True)
        count = num_experts // math.prod(mesh.shape[name] for name in keep)
        first = lax.axis_index(keep) * count if keep else 0
        size = None if count == num_experts else min(c.size, part_size(c.size * count // num_experts))
        out = through_experts(Rows(compute, size), x, w, matrices, c, first, count)
        if gathered:
            out = _scatter_sums(out, gathered)
        rest = tuple(name for name in keep if name not in gathered)
        return (lax.psum(out, rest) if rest else out).reshape(tokens.shape)

    return jax.shard_map(
        local, in_specs=(token_spec, token_spec, token_spec, specs), out_specs=token_spec, check_vma=False
    )(tokens, weights, chosen, matrices)


def part_size(average: int) -> int:
    """Returns how many rows a device with some of the experts computes at a time.

    Args:
        average: rows of the device if all experts are chosen equally often.
    """
    return max(_FEWEST_ROWS, -(-average // 2))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _all_gather(x: Float[Array, "n D"], axes: tuple[str, ...]) -> Float[Array, "gn D"]:
    return lax.all_gather(x, axes, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scatter_sums(x: Float[Array, "gn D"], axes: tuple[str, ...]) -> Float[Array, "n D"]:
    """Sums over the devices, and leaves each with its own rows, like ``psum_scatter``.

    The TPU compiler writes ``psum_scatter`` as an all-reduce of everything, which moves twice as much.
    """
    parts = x.reshape(lax.axis_size(axes), -1, x.shape[-1])
    return jnp.sum(lax.all_to_all(parts, axes, 0, 0), axis=0, dtype=jnp.float32).astype(x.dtype)


_all_gather.defvjp(lambda x, axes: (_all_gather(x, axes), None), lambda axes, _, d_x: (_scatter_sums(d_x, axes),))
_scatter_sums.defvjp(lambda x, axes: (_scatter_sums(x, axes), None), lambda axes, _, d_x: (_all_gather(d_x, axes),))


def moves_tokens(of_weights: int, tokens: tuple[int, ...], itemsize: int, axes: tuple[str, ...], mesh: Any) -> bool:
    """Whether gathering the tokens of the devices along ``axes`` moves fewer bytes than gathering the experts.

    Args:
        of_weights: bytes of the weights of all experts of a layer.
        tokens: the shape of the tokens of all devices.
        itemsize: of a value of a token.
    """
    others = math.prod(size for name, size in mesh.shape.items() if name not in (*axes, "tensor"))
    of_tokens = 2 * math.prod(tokens) * itemsize // others  # to the experts and back
    return of_tokens < of_weights // mesh.shape["tensor"]


def _gather(array: Array, spec: PartitionSpec, keep: tuple[str, ...]) -> Array:
    """All-gathers an array over the mesh axes that shard it, except ``keep``."""
    for dim, names in enumerate(spec):
        gathered = tuple(name for name in names_of(names) if name not in keep)
        if gathered:
            array = lax.all_gather(array, gathered, axis=dim, tiled=True)
    return array


def names_of(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes of an entry of a partition spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _axes(matrices: tuple[ExpertMatrix, ...]) -> Any:
    """Returns the logical axes of each array."""

    def of(matrix: ExpertMatrix) -> ExpertMatrix:
        weight: Any = WEIGHT_AXES
        if isinstance(matrix.weight, QuantizedMatrix):
            weight = QuantizedMatrix(dict.fromkeys(matrix.weight.arrays, WEIGHT_AXES), matrix.weight.fmt)  # type: ignore[arg-type]
        adapter: Any = (("experts", "adapter_expert_in", "rank"), ("experts", "rank", "adapter_expert_out"))
        return ExpertMatrix(
            weight,
            None if matrix.bias is None else ("experts", "norm"),  # type: ignore[arg-type]
            None if matrix.adapter is None else adapter,
            matrix.scale,
            (),
        )

    return tuple(of(matrix) for matrix in matrices)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(one, str) for one in node)
