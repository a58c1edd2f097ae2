"""LoRA as a split of the parameters: attach adapters, label every leaf, separate trainable from frozen.

Everything downstream (gradients, optimizer, checkpoints) sees two plain nested dicts and never asks again what is
trained. Full fine-tuning is the same split with other labels.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sft_jax.errors import UserError
from sft_jax.models.decoder import Decoder, Linear
from sft_jax.models.quantized import QuantizedLeaf, QuantizedParam, quantized_leaves
from sft_jax.sharding import named_sharding
from sft_jax.tree import Params, Path, flatten, unflatten
from sft_jax.typing import Array

FROZEN = "frozen"
LABELS = ("lora_a", "lora_b", "full", "full_no_decay", FROZEN)


@dataclass(frozen=True)
class Split:
    """A network taken apart: what it is, what is trained, what is not. Leaves are abstract, with shardings."""

    graphdef: Any
    trainable: Params  # adapters float32, base weights float32 or bfloat16
    frozen: Params  # compute dtype; the arrays of quantised weights have their own
    labels: dict[Path, str]  # of every leaf, trainable and frozen
    quantized: dict[Path, QuantizedLeaf] = field(default_factory=dict)  # by the weight's path, which is no leaf's

    def base(self) -> dict[Path, jax.ShapeDtypeStruct | QuantizedLeaf]:
        """Everything but adapters: what a base model's files hold."""
        leaves = flatten(self.trainable) | flatten(self.frozen)
        plain = {
            path: leaf for path, leaf in leaves.items() if not is_adapter(path) and path[:-1] not in self.quantized
        }
        return plain | self.quantized

    def merge(self, trainable: Params, frozen: Params) -> Decoder:
        """The network back, with real (or traced) leaves."""
        return nnx.merge(self.graphdef, trainable, frozen)


def attach_lora(
    model: Decoder, rank: int, alpha: float, targets: str | list[str], dropout: float = 0.0, merged: bool = False
) -> list[str]:
    """Put an adapter beside each targeted linear layer, in place; returns the names of the adapted modules.

    ``targets`` follows PEFT: ``"all-linear"`` means every linear layer but the output head; a name matches a module
    whose dotted path is the name or ends with ``.name``. A decoder layer's modules stand for those of all layers.

    Args:
        merged: how a layer computes where it meets more than a token a row; see :func:`project`.

    Raises:
        UserError: a name matches nothing, or names the token table or the output head.
    """
    modules = dict(_linear_modules(model))
    if targets == "all-linear":
        chosen = list(modules)
    else:
        chosen = []
        for target in targets:
            if target.split(".")[-1] in ("lm_head", "embed_tokens"):
                raise UserError(f"lora.target_modules: an adapter on {target!r} is not supported; name decoder modules")
            matched = [name for name in modules if name == target or name.endswith(f".{target}")]
            if not matched:
                known = ", ".join(sorted({name.split(".")[-1] for name in modules}))
                raise UserError(f"lora.target_modules: {target!r} matches no linear layer; this model has {known}")
            chosen += [name for name in matched if name not in chosen]
    for name in chosen:
        linear = modules[name]
        *stack, in_dim, out_dim = linear.kernel.shape
        inner, outer = (f"adapter_{axis}" for axis in linear.axes)
        linear.lora_a = nnx.data(nnx.LoRAParam(jnp.zeros((*stack, in_dim, rank)), axes=(inner, "rank")))
        linear.lora_b = nnx.data(nnx.LoRAParam(jnp.zeros((*stack, rank, out_dim)), axes=("rank", outer)))
        linear.lora_scale = alpha / rank
        linear.lora_dropout = dropout
        linear.lora_merged = merged
    return chosen


def split_params(model: Decoder, mesh: Mesh, full: bool, token_table: bool = False, weights: str = "float32") -> Split:
    """Label every leaf and separate the trainable ones; ``model`` comes from ``nnx.eval_shape``.

    Adapters are float32, frozen leaves take the compute dtype unless they are quantised.

    Args:
        full: train every base weight; otherwise only adapters are.
        token_table: train the token table and the output head besides adapters. Needed where tokens were added: their
            rows start alike, and frozen rows could never be told apart.
        weights: dtype of base weights that are trained. In bfloat16 the step has to round them stochastically, or
            small updates vanish.
    """
    leaves = [(tuple(map(str, path)), variable) for path, variable in nnx.to_flat_state(nnx.state(model))]
    labels = {path: _label(path, variable, full, token_table) for path, variable in leaves}

    def place(path: Path, variable: Any) -> jax.ShapeDtypeStruct:
        dtype = model.dtype if labels[path] == FROZEN else jnp.dtype(weights)
        if is_adapter(path):
            dtype = jnp.float32
        if isinstance(variable, QuantizedParam):
            dtype = variable.dtype
        sharding = named_sharding(mesh, variable.get_metadata("axes"), variable.shape)
        return jax.ShapeDtypeStruct(variable.shape, dtype, sharding=sharding)

    abstract = {path: place(path, variable) for path, variable in leaves}
    graphdef, *_ = nnx.split(model, lambda path, _: labels[tuple(map(str, path))] != FROZEN, ...)
    trainable = {path: leaf for path, leaf in abstract.items() if labels[path] != FROZEN}
    frozen = {path: leaf for path, leaf in abstract.items() if labels[path] == FROZEN}
    return Split(graphdef, unflatten(trainable), unflatten(frozen), labels, quantized_leaves(model, abstract))


def init_adapter(abstract: dict[Path, jax.ShapeDtypeStruct], key: Array) -> dict[Path, Array]:
    """Fresh adapters, born sharded: A ~ U(-1/√in, 1/√in), B = 0, so training starts at the base model.

    The bound is PEFT's Kaiming-uniform with a = √5. Each leaf's numbers depend on its name and the key alone.
    """

    def init() -> dict[Path, Array]:
        values = {}
        for path, leaf in abstract.items():
            if path[-1] == "lora_b":
                values[path] = jnp.zeros(leaf.shape, leaf.dtype)
            else:
                bound = leaf.shape[-2] ** -0.5
                leaf_key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
                values[path] = jax.random.uniform(leaf_key, leaf.shape, leaf.dtype, -bound, bound)
        return values

    return jax.jit(init, out_shardings={path: leaf.sharding for path, leaf in abstract.items()})()


def is_adapter(path: Path) -> bool:
    """Whether a leaf belongs to an adapter."""
    return path[-1] in ("lora_a", "lora_b")


def _label(path: Path, variable: nnx.Variable, full: bool, token_table: bool) -> str:
    """Exactly one label a leaf; a leaf that fits none is a fault of this file, named at start-up."""
    if isinstance(variable, nnx.LoRAParam):
        assert path[-1] in ("lora_a", "lora_b"), path
        return path[-1]
    assert isinstance(variable, nnx.Param), f"no label for {'.'.join(path)} of type {type(variable).__name__}"
    if isinstance(variable, QuantizedParam):
        assert not full, f"{'.'.join(path)} is quantised and cannot be trained"
        return FROZEN
    if not full and not (token_table and path[0] in ("embed_tokens", "lm_head")):
        return FROZEN
    return "full_no_decay" if path[-1] in ("scale", "bias") else "full"


def _linear_modules(model: Decoder) -> Iterator[tuple[str, Linear]]:
    for path, node in nnx.iter_graph(model.layers):
        if isinstance(node, Linear):
            yield ".".join(map(str, ("layers", *path))), node
