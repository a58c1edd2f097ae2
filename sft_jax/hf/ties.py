"""Whether a model's head is its token table: what the files hold decides, where config.json only has a default."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from sft_jax.hf.config import read_architecture
from sft_jax.hf.reader import TensorReader, chunks
from sft_jax.models.architecture import Architecture

_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def architecture_of(folder: Path, reader: TensorReader | None) -> Architecture:
    """The architecture of a model with its weights at hand: as :func:`read_architecture` reads it, but for the head.

    Where config.json ties it to the token table and the files have a head that differs, it is a matrix of its own, as
    transformers has it.

    Args:
        reader: of its weights; None for random ones.
    """
    arch = read_architecture(folder)
    if reader is None or not arch.tie_word_embeddings or not {_TABLE, _HEAD} <= reader.names or _are_equal(reader):
        return arch
    return dataclasses.replace(arch, tie_word_embeddings=False)


def _are_equal(reader: TensorReader) -> bool:
    if reader.shape(_TABLE) != reader.shape(_HEAD):
        return False
    return all(
        np.array_equal(rows, reader.read(_HEAD, start, start + len(rows)), equal_nan=False)
        for start, rows in chunks(reader, _TABLE)
    )
