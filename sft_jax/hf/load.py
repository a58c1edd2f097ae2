"""Loads base weights from safetensors directly into sharded arrays."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from sft_jax.errors import UserError
from sft_jax.files.digests import Words
from sft_jax.hf.place import Made, Recipe, num_bytes, place
from sft_jax.hf.reader import BUFFER_DTYPES, DTYPES, Reader
from sft_jax.models.architecture import Architecture
from sft_jax.models.split import EMBEDDINGS
from sft_jax.models.tensors import Stored
from sft_jax.progress import Work
from sft_jax.tree import Path
from sft_jax.typing import Array

# Buffers in older checkpoints that follow from the config.
_IGNORED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
_OF_BUFFERS = [np.dtype(dtype) for dtype in BUFFER_DTYPES.values()]


class MadeLeaf(Protocol):
    """A base weight that is stored as several arrays, such as a quantized one."""

    @property
    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The stored arrays by name, with shardings."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        ...

    @property
    def made(self) -> Made:
        """The function that quantizes the weight."""
        ...


Leaf = jax.ShapeDtypeStruct | MadeLeaf


def load_params(
    reader: Reader,
    base: Mapping[Path, Leaf],
    stored: Mapping[Path, Stored],
    wanted: Collection[Path],
    arch: Architecture,
    old_vocab_size: int | None = None,
    digests: dict[str, Words] | None = None,
) -> dict[Path, Array]:
    """Reads the ``wanted`` leaves in their dtype and sharding with :mod:`sft_jax.hf.place`.

    First checks all leaves of ``base`` against the files. A quantized leaf is returned as several arrays: ``weight`` as
    ``weight.codes`` and so on.

    If ``old_vocab_size`` is smaller than the vocabulary of ``base``, the added rows of the embeddings and columns of
    ``lm_head`` are initialized to the mean of the existing ones (Hewitt 2021). Added tokens then start as likely as an
    average token, and their logits have an upper bound.

    Args:
        stored: tensor names and layout of each leaf in the files.
        arch: says which further tensors the files may have.
        digests: receives the digest of each tensor that is read.

    Raises:
        UserError: a tensor is missing, has another shape, or does not belong to the network.
    """
    _check(reader, expected_shapes(base, stored, old_vocab_size), arch)
    loaded = {}
    names = [name for path in wanted for name in stored[path].names]
    with Work("loading", sum(num_bytes(reader, name) for name in names), "B", "weights") as work:
        # The largest tensors first, while most memory is free for the buffers of resharding.
        for path in sorted(wanted, key=lambda path: (-math.prod(stored[path].shape(base[path].shape)), path)):
            leaf, recipe = base[path], _recipe(reader, base[path], stored[path])
            arrays = place(reader, stored[path].names, recipe, digests, work.update)
            if isinstance(leaf, jax.ShapeDtypeStruct):
                loaded[path] = arrays[""]
            else:
                loaded |= {(*path, name): array for name, array in arrays.items()}
    return loaded


def expected_shapes(
    base: Mapping[Path, Any], stored: Mapping[Path, Stored], old_vocab_size: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Maps tensor names to their expected shapes in the files."""
    shapes = {}
    for path, leaf in base.items():
        shape = stored[path].shape(leaf.shape)
        if old_vocab_size is not None and path[0] in EMBEDDINGS:
            shape = (old_vocab_size, *shape[1:])
        shapes |= dict.fromkeys(stored[path].names, shape)
    return shapes


def outside_tensors(reader: Reader, arch: Architecture) -> list[str]:
    """Returns the tensors in the files that are not part of the decoder, and are exported as they are."""
    return sorted(name for name in reader.names if arch.outside and name.startswith(arch.outside))


def _recipe(reader: Reader, leaf: Leaf, stored: Stored) -> Recipe:
    """Returns the recipe of a leaf whose tensors :func:`_check` has checked."""
    num_rows, *_ = reader.shape(stored.names[0]) or (1,)
    is_plain = isinstance(leaf, jax.ShapeDtypeStruct)
    return Recipe(
        num_rows=num_rows,
        transposed=stored.transposed,
        added_rows=(stored.shape(leaf.shape) or (1,))[0] - num_rows,
        made=None if is_plain else leaf.made,
        arrays=tuple(({"": leaf} if is_plain else leaf.arrays).items()),
        stack=stored.stack,
        parts=stored.parts,
    )


@dataclass(frozen=True)
class Mismatch:
    """The tensors in which a network and the files differ.

    Attributes:
        missing: tensors of the network that are not in the files.
        reshaped: tensors that have another shape in the files.
        extra: tensors in the files that have no place in the network.
    """

    missing: list[str]
    reshaped: list[str]
    extra: list[str]


def find_mismatch(reader: Reader, expected: Mapping[str, tuple[int, ...]], arch: Architecture) -> Mismatch:
    """Compares the names and shapes of all tensors.

    Buffers that follow from the config are ignored, and a copy of tied embeddings as well.

    Args:
        expected: from :func:`expected_shapes`.
        arch: says which further tensors the files may have.
    """
    names = reader.names
    allowed = {arch.lm_head_tensor} if arch.tie_word_embeddings else set()
    allowed |= set(outside_tensors(reader, arch))
    return Mismatch(
        missing=[name for name in expected if name not in names],
        reshaped=[name for name, shape in expected.items() if name in names and reader.shape(name) != shape],
        extra=sorted(name for name in names - set(expected) - allowed if not name.endswith(_IGNORED)),
    )


def _check(reader: Reader, expected: Mapping[str, tuple[int, ...]], arch: Architecture) -> None:
    found = find_mismatch(reader, expected, arch)
    for name in found.missing:
        present = ", ".join(sorted(reader.names)[:2])
        raise UserError(
            f"{reader.folder}: tensor {name} is missing; the files have {len(reader.names)} tensors, such as {present}"
        )
    for name in found.reshaped:
        raise UserError(
            f"{reader.folder}: tensor {name} has shape {reader.shape(name)}, but config.json implies {expected[name]}"
        )
    for name in expected:
        if (dtype := reader.dtype(name)) in _OF_BUFFERS:
            raise UserError(f"{reader.folder}: tensor {name} has dtype {dtype}; supported are {', '.join(DTYPES)}")
    for name in found.extra:
        raise UserError(f"{reader.folder}: tensor {name} has no place in this model ({len(found.extra)} such tensors)")
