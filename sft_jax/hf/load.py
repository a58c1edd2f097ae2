"""Base weights straight from safetensors into sharded arrays."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import jax

from sft_jax.errors import UserError
from sft_jax.hf.names import is_stacked, is_transposed, tensor_names
from sft_jax.hf.place import Made, Recipe, place
from sft_jax.hf.reader import TensorReader
from sft_jax.tree import Path
from sft_jax.typing import Array

# Buffers that older exports carry and that follow from the config.
_IGNORED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


class MadeLeaf(Protocol):
    """A base weight that is not kept as the files have it, but made into other arrays."""

    @property
    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What is kept, by name, with shardings."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        ...

    @property
    def made(self) -> Made:
        """How."""
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
    """Read the ``wanted`` leaves in their dtype and sharding, as :mod:`sft_jax.hf.place` does.

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
    # The largest tensors first, while there is most room for what moving one of them takes.
    for path in sorted(wanted, key=lambda path: (-_size_of_one(path, abstract[path]), path)):
        leaf = abstract[path]
        kept = place(reader, tensor_names(path, num_layers), _recipe(reader, path, leaf, num_layers))
        if isinstance(leaf, jax.ShapeDtypeStruct):
            loaded[path] = kept[""]
        else:
            loaded |= {(*path, name): array for name, array in kept.items()}
    return loaded


def _size_of_one(path: Path, leaf: Leaf) -> int:
    """Weights in each of a leaf's tensors."""
    return math.prod(leaf.shape[1:] if is_stacked(path) else leaf.shape)


def _recipe(reader: TensorReader, path: Path, leaf: Leaf, num_layers: int) -> Recipe:
    """What becomes of a leaf's tensors, once :func:`_check` has found their shapes right."""
    num_rows = reader.shape(tensor_names(path, num_layers)[0])[0]
    is_plain = isinstance(leaf, jax.ShapeDtypeStruct)
    rows_dim = -1 if is_transposed(path) else int(is_stacked(path))
    return Recipe(
        num_rows=num_rows,
        transposed=is_transposed(path),
        added_rows=leaf.shape[rows_dim] - num_rows,
        made=None if is_plain else leaf.made,
        arrays=tuple(({"": leaf} if is_plain else leaf.arrays).items()),
        stacked=is_stacked(path),
    )


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
            there = ", ".join(sorted(reader.names)[:2])
            raise UserError(
                f"{reader.folder}: tensor {name} is missing; there are {len(reader.names)}, such as {there}"
            )
        if reader.shape(name) != shape:
            raise UserError(
                f"{reader.folder}: tensor {name} has shape {reader.shape(name)}, config.json asks for {shape}"
            )
        reader.dtype(name)
    allowed = {"lm_head.weight"} if tied else set()
    extra = sorted(name for name in reader.names - set(expected) - allowed if not name.endswith(_IGNORED))
    if extra:
        raise UserError(f"{reader.folder}: tensor {extra[0]} has no place in this model ({len(extra)} such tensors)")
