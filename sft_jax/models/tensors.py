"""Maps each parameter to its tensors in the files of a model, for loading, export, PEFT and checks.

``layers.0.self_attn.q_proj.weight`` ``[L, in, out]`` is ``model.layers.{0 … L-1}.self_attn.q_proj.weight``
``[out, in]``. Names are the same except those in ``Architecture.tensors``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from flax import nnx

from sft_jax.models.architecture import Architecture
from sft_jax.models.layers import AdapterParam, Linear, Projection
from sft_jax.models.moe.experts import ExpertLinear, Experts
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
        permutation: of the dimensions of an element ``[E, in, R]`` or ``[E, R, out]``, the adapter of all experts of a
            layer, whose tensor has rank and experts in one dimension; None for other parameters.
    """

    names: tuple[str, ...]
    stack: tuple[int, ...] = ()
    transposed: bool = False
    parts: int = 1
    permutation: tuple[int, ...] | None = None

    def shape(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of each tensor in the files."""
        shape = parameter[len(self.stack) :]
        if self.permutation is not None:
            return self._joined([shape[i] for i in self.permutation])
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
        if self.permutation is not None:
            permuted = element.transpose(self.permutation)
            return permuted.reshape(self._joined(permuted.shape))
        element = self.columns(element, number)
        return element.swapaxes(-1, -2) if self.transposed else element

    def as_in_file(self, parameter: np.ndarray, number: int, dtype: np.dtype) -> np.ndarray:
        """Returns :meth:`tensor` in the dtype of the files, contiguous in memory as safetensors writes it."""
        return np.ascontiguousarray(self.tensor(parameter, number).astype(dtype))

    def element(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the element of a stack that consists of one tensor of the files; the inverse of :meth:`part`."""
        if self.permutation is not None:
            permuted = tensor.reshape([shape[i] for i in self.permutation])
            return permuted.transpose(np.argsort(self.permutation))
        return tensor.swapaxes(-1, -2) if self.transposed else tensor

    def _joined(self, permuted: Sequence[int]) -> tuple[int, int]:
        """Returns the shape of a tensor of all experts: ``[E · R, …]``, or ``[…, R · E]``."""
        assert self.permutation is not None
        first, second, third = permuted
        return (first * second, third) if self.permutation[0] == 0 else (first, second * third)

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
    is_inner: bool = False  # of experts that PEFT wraps twice, for its other parameter

    @property
    def peft_name(self) -> str | None:
        """Its PEFT name within a module; None if it is not a parameter of an adapter."""
        variant = self.module.variant if isinstance(self.module, Linear) else None
        return None if variant is None else variant.tensor_names().get(self.path[-1])


def stored_tensors(model: nnx.Module, arch: Architecture) -> dict[Path, Stored]:
    """Returns the tensors of each weight (quantized or not) and adapter parameter; the model may be abstract."""
    return {one.path: _stored(one, arch) for one in _parameters(model)}


# The PEFT names of an expert's lora_a and lora_b, and the permutation of [E, in, R] and [E, R, out] before rank and
# experts are joined. Where PEFT swaps inputs and outputs, its lora_B is our lora_a.
_EXPERT_ADAPTERS = {
    (False, "lora_a"): ("lora_A.weight", (0, 2, 1)),
    (False, "lora_b"): ("lora_B.weight", (2, 1, 0)),
    (True, "lora_a"): ("lora_B.weight", (1, 2, 0)),
    (True, "lora_b"): ("lora_A.weight", (0, 1, 2)),
}


def _parameters(model: nnx.Module) -> Iterator[_Parameter]:
    wrapped = {id(node.first) for _, node in nnx.iter_graph(model) if isinstance(node, Experts) and node.is_adapted}
    for path, node in nnx.iter_graph(model):
        for name, leaf in vars(node).items() if isinstance(node, nnx.Module) else ():
            if isinstance(leaf, nnx.Variable | Quantized) and not isinstance(node, Quantized):
                is_stacked = path[0] == "layers"
                is_matrix = isinstance(node, Projection) and (
                    name == "weight" or (isinstance(leaf, AdapterParam) and leaf.ndim > 1 + is_stacked)
                )
                yield _Parameter((*map(str, path), name), leaf.shape, is_matrix, node, id(node) in wrapped)


def _stored(parameter: _Parameter, arch: Architecture) -> Stored:
    peft_name = parameter.peft_name
    # A module whose name starts with an underscore does not exist in transformers.
    path = tuple(name for name in parameter.path if not name.startswith("_"))
    prefix, transposed = arch.prefix, parameter.is_matrix
    if peft_name is not None:
        prefix = prefix if arch.module_prefix is None else arch.module_prefix
    if path[0] != "layers":
        (name,) = arch.names_in_files(".".join(path)) if peft_name is None else (".".join([*path[:-1], peft_name]),)
        return Stored((name if path[0] == "lm_head" else prefix + name,), (), transposed)
    _, stack, *parents, last = path
    layers = stacks_of(arch.layers)[stack]
    (layers_name,) = arch.names_in_files("layers")
    if peft_name is not None:
        locals_ = (".".join([*parents, peft_name]),)
    else:
        locals_ = arch.names_in_files(".".join([*parents, last]))
        transposed = transposed and getattr(parameter.module, "transposed", not arch.conv1d)
    layer_names = [f"{prefix}{layers_name}.{i}" for i in layers]
    if isinstance(parameter.module, ExpertLinear) and peft_name is not None:
        # PEFT adapts a parameter of the module of all experts, and names the module
        peft_name, permutation = _EXPERT_ADAPTERS[parameter.module.peft_swaps, last]
        local = ".".join([*parents[:-1], *(["base_layer"] if parameter.is_inner else []), peft_name])
        return Stored(tuple(f"{layer}.{local}" for layer in layer_names), (len(layers),), permutation=permutation)
    if _EXPERT not in locals_[0]:
        names = (f"{layer}.{local}" for layer, local in product(layer_names, locals_))
        return Stored(tuple(names), (len(layers),), transposed, len(locals_))
    num_experts = parameter.shape[1]
    names = (
        f"{layer}.{local.replace(_EXPERT, str(expert))}"
        for layer, expert, local in product(layer_names, range(num_experts), locals_)
    )
    return Stored(tuple(names), (len(layers), num_experts), transposed, len(locals_))
