"""Maps each parameter to its tensors in the files of a model, for loading, export, PEFT and checks.

``layers.0.self_attn.q_proj.weight`` ``[L, in, out]`` is ``model.layers.{0 … L-1}.self_attn.q_proj.weight``
``[out, in]``. Names are the same except those in ``Architecture.tensors``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

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
        names: tensor names, without PEFT's prefix: one per element of the stack and part, in order.
        stack: the leading dimensions of the parameter that the names run over: layers, then experts if each has its
            own tensors. Empty for a single tensor.
        transposed: whether the files store ``[…, out, in]`` for a parameter ``[…, in, out]``.
        parts: the number of tensors that are concatenated along the last dimension of an element.
    """

    names: tuple[str, ...]
    stack: tuple[int, ...] = ()
    transposed: bool = False
    parts: int = 1

    def shape(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of each tensor in the files."""
        shape = parameter[len(self.stack) :]
        shape = (*shape[:-1], *(last // self.parts for last in shape[-1:]))
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def index(self, number: int) -> tuple[int, ...]:
        """Returns the index in the stack of the tensor with this number."""
        return tuple(map(int, np.unravel_index(number // self.parts, self.stack))) if self.stack else ()

    def columns(self, element: Any, number: int) -> Any:
        """Returns the outputs that belong to the tensor with this number, of an element of the stack."""
        size = element.shape[-1] // self.parts
        first = number % self.parts * size
        return element if self.parts == 1 else element[..., first : first + size]

    def part(self, element: Any, number: int) -> Any:
        """Returns the tensor with this number, as in the files, of an element of the stack."""
        element = self.columns(element, number)
        return element.swapaxes(-1, -2) if self.transposed else element

    def tensor(self, parameter: Any, number: int) -> Any:
        """Returns the tensor with this number, as in the files, of a parameter."""
        return self.part(parameter[self.index(number)], number)


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a model: its path, its shape, and what its module says about it."""

    path: Path
    shape: tuple[int, ...]
    is_matrix: bool  # of a linear layer or its adapter
    module: nnx.Module

    @property
    def peft_name(self) -> str | None:
        """Its PEFT name within a module; None if it is not a parameter of an adapter."""
        variant = self.module.variant if isinstance(self.module, Linear) else None
        return None if variant is None else variant.tensor_names().get(self.path[-1])


def stored_tensors(model: nnx.Module, arch: Architecture) -> dict[Path, Stored]:
    """Returns the tensors of each weight (quantized or not) and adapter parameter; the model may be abstract."""
    return {one.path: _stored(one, arch) for one in _parameters(model)}


def _parameters(model: nnx.Module) -> Iterator[_Parameter]:
    for path, node in nnx.iter_graph(model):
        for name, leaf in vars(node).items() if isinstance(node, nnx.Module) else ():
            if isinstance(leaf, nnx.Variable | Quantized) and not isinstance(node, Quantized):
                is_matrix = isinstance(node, Projection) and (
                    name == "weight" or (isinstance(leaf, AdapterParam) and leaf.ndim > 2)
                )
                yield _Parameter((*map(str, path), name), leaf.shape, is_matrix, node)


def _stored(parameter: _Parameter, arch: Architecture) -> Stored:
    path, peft_name = parameter.path, parameter.peft_name
    if path[0] != "layers":
        (name,) = arch.names_in_files(".".join(path))
        return Stored((name if path[0] == "lm_head" else arch.prefix + name,), (), parameter.is_matrix)
    _, stack, *parents, last = path
    layers = stacks_of(arch.layers)[stack]
    prefix, transposed = arch.prefix, parameter.is_matrix
    (layers_name,) = arch.names_in_files("layers")
    if peft_name is not None:
        prefix = prefix if arch.module_prefix is None else arch.module_prefix
        locals_ = (".".join([*parents, peft_name]),)
    else:
        assert not isinstance(parameter.module, Projection) or last in ("weight", "bias"), path
        locals_ = arch.names_in_files(".".join([*parents, last]))
        transposed = transposed and getattr(parameter.module, "transposed", not arch.conv1d)
    layer_names = [f"{prefix}{layers_name}.{i}" for i in layers]
    if _EXPERT not in locals_[0]:
        names = (f"{layer}.{local}" for layer, local in product(layer_names, locals_))
        return Stored(tuple(names), (len(layers),), transposed, len(locals_))
    num_experts = parameter.shape[1]
    names = (
        f"{layer}.{local.replace(_EXPERT, str(expert))}"
        for layer, expert, local in product(layer_names, range(num_experts), locals_)
    )
    return Stored(tuple(names), (len(layers), num_experts), transposed, len(locals_))
