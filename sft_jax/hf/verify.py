"""Compares the tensors of a base model with those that a run began with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from sft_jax.errors import UserError
from sft_jax.files.digests import Words, texts, words_of_rows
from sft_jax.hf.reader import Reader, chunks


def check_tensors(reader: Reader, expected: Mapping[str, str], words: Mapping[str, Words]) -> None:
    """Compares digests of tensors with those that a run began with; one that the run did not read is not compared.

    Raises:
        UserError: names the first tensor that differs.
    """
    for name, digest in texts(words).items():
        if expected.get(name, digest) != digest:
            raise UserError(
                f"{reader.folder}: tensor {name} is not what the run began with; its file is damaged or was replaced: "
                "download it again"
            )


def verified_chunks(reader: Reader, name: str, expected: Mapping[str, str]) -> Iterator[tuple[int, np.ndarray]]:
    """Reads a tensor as :func:`sft_jax.hf.reader.chunks` does, and compares it at the end.

    Raises:
        UserError: it is not what the run began with.
    """
    words: Words = ()
    for start, rows in chunks(reader, name):
        if name in expected:
            words = words_of_rows(rows, start, words)
        yield start, rows
    if words:
        check_tensors(reader, expected, {name: words})


def read_verified(reader: Reader, name: str, expected: Mapping[str, str]) -> np.ndarray:
    """Reads a whole tensor, and compares it; see :func:`verified_chunks`."""
    rows = [rows for _, rows in verified_chunks(reader, name, expected)]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)
