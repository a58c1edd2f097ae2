"""Decides from the weights what config.json leaves open: the names of tensors, and whether ``lm_head`` is tied."""

from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path

import numpy as np

from sft_jax.hf.config import read_architecture
from sft_jax.hf.reader import Reader, chunks
from sft_jax.models.architecture import Architecture
from sft_jax.models.families import as_in_files


def architecture_of(folder: Path, reader: Reader | None) -> Architecture:
    """Reads the architecture like :func:`read_architecture`, and corrects it from the weights.

    If config.json ties ``lm_head`` to the embeddings but the files have a different ``lm_head``, it is untied, as in
    transformers. If the files have the names of another layout of the family, these are the names.

    Args:
        reader: reader of the weights; None for random weights.
    """
    arch = read_architecture(folder)
    if reader is None:
        return arch
    names = reader.names
    arch = as_in_files(_with_layout(arch, reader), lambda name: reader.shape(name) if name in names else None)
    if not arch.tie_word_embeddings or arch.lm_head_tensor not in reader.names or _are_equal(arch, reader):
        return arch
    return dataclasses.replace(arch, tie_word_embeddings=False)


def _with_layout(arch: Architecture, reader: Reader) -> Architecture:
    layouts = [(arch.prefix, arch.names_in_files("lm_head")[0]), *arch.layouts]
    found = []
    for prefix, lm_head in [*layouts, *product(*map(dict.fromkeys, zip(*layouts, strict=True)))]:
        changed = dataclasses.replace(arch, prefix=prefix, tensors=(("lm_head", lm_head), *arch.tensors))
        if changed.embeddings_tensor in reader.names:
            found.append(changed if (prefix, lm_head) != layouts[0] else arch)
    # Some files have the decoder's names of one layout and lm_head's of another, and tied ones have no lm_head.
    return next((one for one in found if one.lm_head_tensor in reader.names), found[0] if found else arch)


def _are_equal(arch: Architecture, reader: Reader) -> bool:
    embeddings, lm_head = arch.embeddings_tensor, arch.lm_head_tensor
    if embeddings not in reader.names or reader.shape(embeddings) != reader.shape(lm_head):
        return embeddings not in reader.names  # loading says what is missing
    return all(
        np.array_equal(rows, reader.read(lm_head, start, start + len(rows)), equal_nan=False)
        for start, rows in chunks(reader, embeddings)
    )
