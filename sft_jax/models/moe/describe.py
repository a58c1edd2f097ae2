"""Describes how the experts of a model are sharded, for messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from flax import nnx

from sft_jax.models.moe import rows
from sft_jax.models.moe.dispatch import WEIGHT_AXES, moves_tokens, names_of, part_size
from sft_jax.models.moe.experts import ExpertLinear
from sft_jax.sharding import partition_spec

EXPERT_LOOPS = Path(rows.__file__).name  # the file whose loops turn once for each part of a device's rows


def describe_experts(model: nnx.Module, mesh: Any, tokens: tuple[int, int, int], itemsize: int) -> str | None:
    """Returns where the experts are, and what each layer gathers; None without experts or other devices.

    Args:
        model: may be abstract; the first layer with experts stands for all.
        tokens: the shape ``[B, T, D]`` of a microbatch.
        itemsize: of a value of a token.
    """
    found = _experts(model)
    if not found or mesh.size == 1:
        return None
    num_experts = found[0].weight.shape[-3]
    axes = names_of(partition_spec(WEIGHT_AXES, (num_experts, 1, 1), mesh)[0])
    leaves = jax.tree.leaves([nnx.state(one)["weight"] for one in found[:2]])
    of_layer = sum(leaf.size // leaf.shape[0] * leaf.dtype.itemsize for leaf in leaves)
    exchanged = tuple(name for name in axes if name != "tensor")
    moves = bool(exchanged) and moves_tokens(of_layer, tokens, itemsize, exchanged, mesh)
    where = " × ".join(f"{name} {mesh.shape[name]}" for name in axes) or "no axis"
    return f"{num_experts} over {where}, {'tokens' if moves else 'weights'} gathered"


def expected_parts(model: nnx.Module, tokens: int, tensor: int) -> int:
    """Returns how often the loop over the rows of a device's experts turns; 1 without experts.

    One turn more than if all experts were chosen equally often: all devices wait for the one with most rows.

    Args:
        model: may be abstract; the first layer with experts stands for all.
        tokens: of a microbatch on one device.
        tensor: size of the mesh axis.
    """
    found = _experts(model)
    if not found:
        return 1
    average = round(tokens * found[0].share * found[0].weight.shape[-3]) // tensor
    return average // part_size(average) + 1


def _experts(model: nnx.Module) -> list[ExpertLinear]:
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, ExpertLinear)]
