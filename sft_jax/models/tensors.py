"""Maps each parameter to its tensors in the files of a model, for loading, export, PEFT and checks.

``layers.0.self_attn.q_proj.weight`` ``[L, in, out]`` is ``model.layers.{0 … L-1}.self_attn.q_proj.weight``
``[out, in]``. Names are the same except those in ``Architecture.tensors``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from flax import nnx

from sft_jax.models.architecture import Architecture
from sft_jax.models.layers import AdapterParam, Linear, Projection
from sft_jax.models.quantized import Quantized
from sft_jax.models.stages import stacks_of
from sft_jax.tree import Path

_EXPERT = "{expert}"


@dataclass(frozen=True)
class Stored:
    """The tensors in the files that a parameter consists of.

    Attributes:
        names: tensor names, one per element of the stack, in order, without PEFT's prefix.
        stack: the leading dimensions of the parameter: layers, then experts. Empty for a single tensor.
        transposed: whether the files store ``[out, in]`` for a parameter ``[in, out]``.
    """

    names: tuple[str, ...]
    stack: tuple[int, ...] = ()
    transposed: bool = False

    def shape(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of each tensor in the files."""
        shape = tuple(parameter[len(self.stack) :])
        return shape[::-1] if self.transposed else shape

    def index(self, number: int) -> tuple[int, ...]:
        """Returns the index in the stack of the tensor with this number."""
        return tuple(map(int, np.unravel_index(number, self.stack))) if self.stack else ()


def stored_tensors(model: nnx.Module, arch: Architecture) -> dict[Path, Stored]:
    """Returns the tensors of each weight (quantized or not) and adapter parameter; the model may be abstract."""
    return {path: _stored(path, shape, is_matrix, names, arch) for path, shape, is_matrix, names in _parameters(model)}


def _parameters(model: nnx.Module) -> Iterator[tuple[Path, tuple[int, ...], bool, dict[str, str]]]:
    """Yields path, shape, whether it is a linear weight, and the PEFT names of the adapter parameters of its module."""
    for path, node in nnx.iter_graph(model):
        names = dict(node.variant.tensor_names()) if isinstance(node, Linear) and node.variant is not None else {}
        for name, leaf in vars(node).items() if isinstance(node, nnx.Module) else ():
            if isinstance(leaf, nnx.Variable | Quantized) and not isinstance(node, Quantized):
                is_matrix = isinstance(node, Projection) and (
                    name == "weight" or (isinstance(leaf, AdapterParam) and leaf.ndim > 2)
                )
                yield (*map(str, path), name), leaf.shape, is_matrix, names


def _stored(path: Path, shape: tuple[int, ...], is_matrix: bool, adapter: dict[str, str], arch: Architecture) -> Stored:
    if path[0] != "layers":
        name = ".".join(path)
        return Stored((name if path[0] == "lm_head" else f"model.{name}",), (), is_matrix)
    _, stack, *parents, last = path
    local = _renamed(".".join([*parents, last]), arch.tensors)
    if last in adapter:
        local = f"{local.removesuffix(last)}{adapter[last]}"
    layers = stacks_of(arch.layers)[stack]
    if _EXPERT not in local:
        return Stored(tuple(f"model.layers.{i}.{local}" for i in layers), (len(layers),), is_matrix)
    num_experts = shape[1]
    names = (f"model.layers.{i}.{local.replace(_EXPERT, str(e))}" for i, e in product(layers, range(num_experts)))
    return Stored(tuple(names), (len(layers), num_experts), is_matrix)


def _renamed(name: str, tensors: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in tensors:
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name
