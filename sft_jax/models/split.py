"""The split of the parameters: label every one, separate those that are trained from those that are frozen.

Everything downstream (gradients, optimizer, checkpoints) sees two plain nested dicts and never asks again what is
trained. LoRA and full fine-tuning are the same split with other labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sft_jax.models.architecture import Architecture
from sft_jax.models.attention.backend import Backend
from sft_jax.models.decoder import Decoder
from sft_jax.models.layers import AdapterParam, Variant
from sft_jax.models.quantized import QuantizedLeaf, QuantizedParam, quantized_leaves
from sft_jax.models.stages import stacks_of
from sft_jax.models.tensors import Stored, stored_tensors
from sft_jax.sharding import named_sharding
from sft_jax.tree import Params, Path, flatten, unflatten

FROZEN = "frozen"
LABELS = ("lora_a", "lora_b", "adapter_vector", "full", "full_no_decay", FROZEN)
EMBEDDINGS = ("embed_tokens", "lm_head")  # the modules whose weights have an entry for each token


@dataclass(frozen=True)
class Split:
    """A network taken apart: what it is, what is trained, what is not. Leaves are abstract, with shardings."""

    graphdef: Any
    trainable: Params  # adapters float32, base weights float32 or bfloat16
    frozen: Params  # compute dtype; the arrays of quantised weights have their own
    labels: dict[Path, str]  # of every leaf, trainable and frozen
    arch: Architecture
    variant: Variant | None  # of the adapters, where there are any
    stored: dict[Path, Stored]  # where each weight and adapter parameter lies in files
    quantized: dict[Path, QuantizedLeaf] = field(default_factory=dict)  # by the weight's path, which is no leaf's

    def base(self) -> dict[Path, jax.ShapeDtypeStruct | QuantizedLeaf]:
        """Everything but adapters: what a base model's files hold."""
        leaves = flatten(self.trainable) | flatten(self.frozen)
        plain = {
            path: leaf
            for path, leaf in leaves.items()
            if not is_adapter(self.labels[path]) and path[:-1] not in self.quantized
        }
        return plain | self.quantized

    def adapter(self) -> dict[Path, jax.ShapeDtypeStruct]:
        """The parameters of adapters."""
        return {path: leaf for path, leaf in flatten(self.trainable).items() if is_adapter(self.labels[path])}

    def layers(self, path: Path) -> tuple[int, ...]:
        """The numbers of the decoder layers that a leaf of ``layers`` is stacked from."""
        return stacks_of(self.arch.layers)[path[1]]

    @property
    def mesh(self) -> Mesh:
        """Of the devices that its leaves are on."""
        return jax.tree.leaves((self.trainable, self.frozen))[0].sharding.mesh

    @property
    def backend(self) -> Backend:
        """Of attention."""
        return self.abstract().backend

    def abstract(self) -> Decoder:
        """The network without values: what ``plan`` asks for sizes."""
        return self.merge(self.trainable, self.frozen)

    def merge(self, trainable: Params, frozen: Params) -> Decoder:
        """The network back, with real (or traced) leaves."""
        return nnx.merge(self.graphdef, trainable, frozen)


def split_params(
    model: Decoder, mesh: Mesh, full: bool, embeddings: bool = False, param_dtype: str = "float32"
) -> Split:
    """Label every leaf and separate the trainable ones; ``model`` comes from ``nnx.eval_shape``.

    Adapters are float32, frozen leaves take the compute dtype unless they are quantised.

    Args:
        full: train every base weight; otherwise only adapters are.
        embeddings: train the embeddings and ``lm_head`` besides adapters. Needed where tokens were added: their rows
            start alike, and frozen rows could never be told apart.
        param_dtype: of base weights that are trained. In bfloat16 the step has to round them stochastically, or small
            updates vanish.
    """
    leaves = [(tuple(map(str, path)), variable) for path, variable in nnx.to_flat_state(nnx.state(model))]
    labels = {path: _label(path, variable, full, embeddings) for path, variable in leaves}

    def abstract_leaf(path: Path, variable: Any) -> jax.ShapeDtypeStruct:
        dtype = model.dtype if labels[path] == FROZEN else jnp.dtype(param_dtype)
        if is_adapter(labels[path]):
            dtype = jnp.float32
        if isinstance(variable, QuantizedParam):
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
    """Whether a leaf of this label belongs to an adapter."""
    return label in ("lora_a", "lora_b", "adapter_vector")


def _label(path: Path, variable: nnx.Variable, full: bool, embeddings: bool) -> str:
    """Exactly one label a leaf; a leaf that fits none is a fault of this file, named at start-up."""
    if isinstance(variable, AdapterParam):
        return path[-1] if path[-1] in LABELS else "adapter_vector"
    assert isinstance(variable, nnx.Param), f"no label for {'.'.join(path)} of type {type(variable).__name__}"
    if isinstance(variable, QuantizedParam):
        assert not full, f"{'.'.join(path)} is quantised and cannot be trained"
        return FROZEN
    if not full and not (embeddings and path[0] in EMBEDDINGS):
        return FROZEN
    return "full" if len(variable.get_metadata("axes")) > 1 else "full_no_decay"
