"""Base weights straight from safetensors into sharded arrays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.errors import UserError
from sft_jax.hf.names import is_stacked, is_transposed, tensor_names
from sft_jax.hf.reader import TensorReader
from sft_jax.tree import Path
from sft_jax.typing import Array

# Buffers that older exports carry and that follow from the config.
_IGNORED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")

Index = tuple[slice, ...]


class MadeLeaf(Protocol):
    """A base weight that is not kept as the files have it, but made into other arrays."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        ...

    def make(self, read: Callable[[Index], np.ndarray]) -> dict[str, Array]:
        """The arrays by name, each in place; ``read`` gives any part of the weight in the files' dtype."""
        ...


Leaf = jax.ShapeDtypeStruct | MadeLeaf


def load_params(
    reader: TensorReader,
    abstract: Mapping[Path, Leaf],
    wanted: Collection[Path],
    num_layers: int,
    tied: bool,
    old_vocab_size: int | None = None,
) -> dict[Path, Array]:
    """Read the ``wanted`` leaves in their dtype and sharding; each device gets only its own part.

    ``abstract`` describes all base leaves, which are checked against the files before the first is read. One that is
    made into arrays comes back as several: ``kernel`` as ``kernel.codes`` and so on.

    Where ``old_vocab_size`` is smaller than the vocabulary of ``abstract``, the added rows of the token table and
    columns of the head start at the mean of the existing ones (Hewitt 2021), so that the added tokens begin as
    likely as an average token and bound its logit from above.

    Raises:
        UserError: a tensor is missing, has another shape, or is in the files but has no place in the network.
    """
    _check(reader, abstract, num_layers, tied, old_vocab_size)
    loaded = {}
    for path, leaf in abstract.items():
        if path in wanted:
            read = _reading(reader, path, leaf, num_layers, old_vocab_size)
            if isinstance(leaf, jax.ShapeDtypeStruct):
                loaded[path] = _as_it_is(leaf, read)
            else:
                loaded |= {(*path, name): array for name, array in leaf.make(read).items()}
    return loaded


def expected_shapes(abstract: Mapping[Path, Any], num_layers: int) -> dict[str, tuple[int, ...]]:
    """File tensor name to file shape, of every leaf."""
    shapes = {}
    for path, leaf in abstract.items():
        shape = leaf.shape[1:] if is_stacked(path) else leaf.shape
        shape = shape[::-1] if is_transposed(path) else shape
        shapes |= dict.fromkeys(tensor_names(path, num_layers), tuple(shape))
    return shapes


def _check(reader: TensorReader, abstract: Mapping, num_layers: int, tied: bool, old_vocab_size: int | None) -> None:
    expected = expected_shapes(abstract, num_layers)
    if old_vocab_size is not None:
        for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(expected):
            expected[name] = (old_vocab_size, *expected[name][1:])
    for name, shape in expected.items():
        if name not in reader.names:
            raise UserError(f"{reader.folder}: tensor {name} is missing")
        if reader.shape(name) != shape:
            raise UserError(
                f"{reader.folder}: tensor {name} has shape {reader.shape(name)}, config.json asks for {shape}"
            )
        reader.dtype(name)
    allowed = {"lm_head.weight"} if tied else set()
    extra = sorted(name for name in reader.names - set(expected) - allowed if not name.endswith(_IGNORED))
    if extra:
        raise UserError(f"{reader.folder}: tensor {extra[0]} has no place in this model ({len(extra)} such tensors)")


def _as_it_is(leaf: jax.ShapeDtypeStruct, read: Callable[[Index], np.ndarray]) -> Array:
    def part(index: Index) -> np.ndarray:
        return np.ascontiguousarray(read(index)).astype(jnp.dtype(leaf.dtype))

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)  # type: ignore[arg-type]


def _reading(
    reader: TensorReader, path: Path, leaf: Leaf, num_layers: int, old_vocab_size: int | None
) -> Callable[[Index], np.ndarray]:
    """A function that reads any part of a base weight, stacked and transposed as the network has it."""
    names = tensor_names(path, num_layers)
    vocab_dim = 1 if is_transposed(path) else 0
    grows = path[0] in ("embed_tokens", "lm_head") and old_vocab_size not in (None, leaf.shape[vocab_dim])

    def read(name: str, index: Index) -> np.ndarray:
        part = reader.read(name, index[::-1] if is_transposed(path) else index)
        return part.T if is_transposed(path) else part

    def part(index: Index) -> np.ndarray:
        if is_stacked(path):
            layers, *rest = index
            return np.stack([read(name, tuple(rest)) for name in names[layers]])
        if grows:
            table = np.asarray(reader.read(names[0]))
            added = leaf.shape[vocab_dim] - table.shape[0]
            mean = table.astype(np.float32).mean(axis=0, keepdims=True).astype(table.dtype)
            table = np.concatenate([table, np.repeat(mean, added, axis=0)])
            return (table.T if is_transposed(path) else table)[index]
        return read(names[0], index)

    return part
