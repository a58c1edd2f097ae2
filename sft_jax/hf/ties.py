"""Decides whether ``lm_head`` is tied to the embeddings, from the weights rather than from config.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from sft_jax.hf.config import read_architecture
from sft_jax.hf.reader import TensorReader, chunks
from sft_jax.models.architecture import Architecture

_EMBEDDINGS, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def architecture_of(folder: Path, reader: TensorReader | None) -> Architecture:
    """Reads the architecture like :func:`read_architecture`, and corrects ``tie_word_embeddings`` from the weights.

    If config.json ties ``lm_head`` to the embeddings but the files have a different ``lm_head``, it is untied, as in
    transformers.

    Args:
        reader: reader of the weights; None for random weights.
    """
    arch = read_architecture(folder)
    if (
        reader is None
        or not arch.tie_word_embeddings
        or not {_EMBEDDINGS, _LM_HEAD} <= reader.names
        or _are_equal(reader)
    ):
        return arch
    return dataclasses.replace(arch, tie_word_embeddings=False)


def _are_equal(reader: TensorReader) -> bool:
    if reader.shape(_EMBEDDINGS) != reader.shape(_LM_HEAD):
        return False
    return all(
        np.array_equal(rows, reader.read(_LM_HEAD, start, start + len(rows)), equal_nan=False)
        for start, rows in chunks(reader, _EMBEDDINGS)
    )
