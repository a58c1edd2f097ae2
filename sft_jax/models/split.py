"""Splits the parameters of a model into trainable and frozen ones, by label.

Gradients, optimizer and checkpoints work on two plain nested dicts. LoRA and full fine-tuning differ only in labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sft_jax.models.architecture import EMBEDDINGS, Architecture
from sft_jax.models.attention.backend import Backend
from sft_jax.models.decoder import Decoder
from sft_jax.models.layers import AdapterParam, Buffer, Variant
from sft_jax.models.quantized import QuantizedLeaf, QuantizedParam, quantized_leaves
from sft_jax.models.stages import stacks_of
from sft_jax.models.tensors import Stored, stored_tensors
from sft_jax.sharding import named_sharding
from sft_jax.tree import Params, Path, flatten, unflatten

FROZEN = "frozen"
LABELS = ("lora_a", "lora_b", "adapter_vector", "full", "full_no_decay", FROZEN)


@dataclass(frozen=True)
class Split:
    """A model split into its graph, trainable and frozen parameters. Leaves are abstract arrays with shardings."""

    graphdef: Any
    trainable: Params  # adapters float32, base weights float32 or bfloat16
    frozen: Params  # compute dtype; arrays of quantized weights have their own
    labels: dict[Path, str]  # label of every leaf, trainable and frozen
    arch: Architecture
    variant: Variant | None  # adapter method; None without adapters
    stored: dict[Path, Stored]  # tensors in the files of each weight and adapter parameter
    quantized: dict[Path, QuantizedLeaf] = field(
        default_factory=dict
    )  # by path of the weight, which is not the path of a leaf

    def base(self) -> dict[Path, jax.ShapeDtypeStruct | QuantizedLeaf]:
        """Returns all parameters except adapters, as in the files of a base model."""
        leaves = flatten(self.trainable) | flatten(self.frozen)
        plain = {
            path: leaf
            for path, leaf in leaves.items()
            if not is_adapter(self.labels[path]) and path[:-1] not in self.quantized
        }
        return plain | self.quantized

    def adapter(self) -> dict[Path, jax.ShapeDtypeStruct]:
        """Returns the adapter parameters."""
        return {path: leaf for path, leaf in flatten(self.trainable).items() if is_adapter(self.labels[path])}

    def layers(self, path: Path) -> tuple[int, ...]:
        """Returns the indices of the decoder layers in a stacked leaf of ``layers``; none for another leaf."""
        return stacks_of(self.arch.layers)[path[1]] if path[0] == "layers" else ()

    @property
    def mesh(self) -> Mesh:
        """The mesh of the leaves."""
        return jax.tree.leaves((self.trainable, self.frozen))[0].sharding.mesh

    @property
    def backend(self) -> Backend:
        """The attention backend."""
        return self.abstract().backend

    def abstract(self) -> Decoder:
        """Returns the model with abstract leaves, for ``plan``."""
        return self.merge(self.trainable, self.frozen)

    def merge(self, trainable: Params, frozen: Params) -> Decoder:
        """Returns the model with these leaves, concrete or traced."""
        return nnx.merge(self.graphdef, trainable, frozen)


def split_params(
    model: Decoder, mesh: Mesh, full: bool, embeddings: bool = False, param_dtype: str = "float32"
) -> Split:
    """Labels every leaf and separates trainable from frozen leaves; ``model`` comes from ``nnx.eval_shape``.

    Adapters are float32. Frozen leaves have the compute dtype unless they are quantized.

    Args:
        full: train every base weight; otherwise train adapters only.
        embeddings: also train the embeddings and ``lm_head``. Required for added tokens: their embeddings start equal,
            and the model could not distinguish them if they were frozen.
        param_dtype: dtype of trained base weights. In bfloat16 the step must round stochastically, or small updates
            are lost.
    """
    leaves = [(tuple(map(str, path)), variable) for path, variable in nnx.to_flat_state(nnx.state(model))]
    labels = {path: _label(path, variable, full, embeddings) for path, variable in leaves}

    def abstract_leaf(path: Path, variable: Any) -> jax.ShapeDtypeStruct:
        dtype = model.dtype if labels[path] == FROZEN else jnp.dtype(param_dtype)
        if is_adapter(labels[path]):
            dtype = jnp.float32
        if isinstance(variable, QuantizedParam | Buffer):
            dtype = variable.dtype
        sharding = named_sharding(mesh, variable.get_metadata("axes"), variable.shape)
        return jax.ShapeDtypeStruct(variable.shape, dtype, sharding=sharding)

    abstract = {path: abstract_leaf(path, variable) for path, variable in leaves}
    graphdef, *_ = nnx.split(model, lambda path, _: labels[tuple(map(str, path))] != FROZEN, ...)
    trainable = {path: leaf for path, leaf in abstract.items() if labels[path] != FROZEN}
    frozen = {path: leaf for path, leaf in abstract.items() if labels[path] == FROZEN}
    return Split(
        graphdef,
        unflatten(trainable),
        unflatten(frozen),
        labels,
        model.arch,
        next((node.variant for _, node in nnx.iter_graph(model) if getattr(node, "variant", None) is not None), None),
        stored_tensors(model, model.arch),
        quantized_leaves(model, abstract),
    )


def is_adapter(label: str) -> bool:
    """Returns whether this is a label of adapter parameters."""
    return label in ("lora_a", "lora_b", "adapter_vector")


def _label(path: Path, variable: nnx.Variable, full: bool, embeddings: bool) -> str:
    """Returns the label of a leaf. A leaf without a label is a bug in this file and fails at start-up."""
    if isinstance(variable, AdapterParam):
        return path[-1] if path[-1] in LABELS else "adapter_vector"
    assert isinstance(variable, nnx.Param), f"no label for {'.'.join(path)} of type {type(variable).__name__}"
    if isinstance(variable, QuantizedParam):
        assert not full, f"{'.'.join(path)} is quantized and cannot be trained"
        return FROZEN
    if isinstance(variable, Buffer):
        return FROZEN
    if not full and not (embeddings and path[0] in EMBEDDINGS):
        return FROZEN
    return "full" if len(variable.get_metadata("axes")) > 1 else "full_no_decay"
