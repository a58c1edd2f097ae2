"""Base weights straight from safetensors into sharded arrays."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import jax

from sft_jax.errors import UserError
from sft_jax.hf.place import Made, Recipe, place
from sft_jax.hf.reader import TensorReader
from sft_jax.models.split import EMBEDDINGS
from sft_jax.models.tensors import Stored
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
    base: Mapping[Path, Leaf],
    stored: Mapping[Path, Stored],
    wanted: Collection[Path],
    tied: bool,
    old_vocab_size: int | None = None,
) -> dict[Path, Array]:
    """Read the ``wanted`` leaves in their dtype and sharding, as :mod:`sft_jax.hf.place` does.

    ``base`` describes all base leaves, which are checked against the files before the first is read. One that is made
    into arrays comes back as several: ``weight`` as ``weight.codes`` and so on.

    Where ``old_vocab_size`` is smaller than the vocabulary of ``base``, the added rows of the embeddings and columns of
    ``lm_head`` start at the mean of the existing ones (Hewitt 2021), so that the added tokens begin as likely as an
    average token and bound its logit from above.

    Args:
        stored: where each of them lies.
        tied: whether the embeddings are ``lm_head`` too.

    Raises:
        UserError: a tensor is missing, has another shape, or is in the files but has no place in the network.
    """
    _check(reader, expected_shapes(base, stored, old_vocab_size), tied)
    loaded = {}
    # The largest tensors first, while there is most room for what moving one of them takes.
    for path in sorted(wanted, key=lambda path: (-math.prod(stored[path].shape(base[path].shape)), path)):
        leaf = base[path]
        kept = place(reader, stored[path].names, _recipe(reader, leaf, stored[path]))
        if isinstance(leaf, jax.ShapeDtypeStruct):
            loaded[path] = kept[""]
        else:
            loaded |= {(*path, name): array for name, array in kept.items()}
    return loaded


def expected_shapes(
    base: Mapping[Path, Any], stored: Mapping[Path, Stored], old_vocab_size: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The shape in the files of each tensor, by its name."""
    shapes = {}
    for path, leaf in base.items():
        shape = stored[path].shape(leaf.shape)
        if old_vocab_size is not None and path[0] in EMBEDDINGS:
            shape = (old_vocab_size, *shape[1:])
        shapes |= dict.fromkeys(stored[path].names, shape)
    return shapes


def _recipe(reader: TensorReader, leaf: Leaf, stored: Stored) -> Recipe:
    """What becomes of a leaf's tensors, once :func:`_check` has found their shapes right."""
    num_rows = reader.shape(stored.names[0])[0]
    is_plain = isinstance(leaf, jax.ShapeDtypeStruct)
    return Recipe(
        num_rows=num_rows,
        transposed=stored.transposed,
        added_rows=stored.shape(leaf.shape)[0] - num_rows,
        made=None if is_plain else leaf.made,
        arrays=tuple(({"": leaf} if is_plain else leaf.arrays).items()),
        stack=stored.stack,
    )


def _check(reader: TensorReader, expected: Mapping[str, tuple[int, ...]], tied: bool) -> None:
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
