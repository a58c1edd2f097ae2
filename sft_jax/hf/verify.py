"""Compares the files and tensors of a base model with those that a run began with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from sft_jax.errors import UserError
from sft_jax.files.digests import Words, first_difference, folder_digests, texts, words_of_rows
from sft_jax.hf.reader import Reader, chunks
from sft_jax.hf.tokenizer_files import FILES

_FILES = ("config.json", "generation_config.json", *FILES)


def file_digests(folder: Path) -> dict[str, str]:
    """Returns the digests of the files of a base model that runs and exports read, other than weights."""
    return folder_digests(folder, _FILES)


def check_files(folder: Path, expected: Mapping[str, str], found: Mapping[str, str] | None = None) -> None:
    """Compares the files of a base model, other than weights, with those that a run began with.

    Args:
        expected: from :func:`file_digests`; empty for runs of version 0.1.
        found: those of the files now, if they are already computed.

    Raises:
        UserError: names the first file that differs.
    """
    if not expected:
        return
    name = first_difference(expected, file_digests(folder) if found is None else found)
    if name is not None:
        raise UserError(f"{folder / name}: is not what the run began with; restore it, or begin another run")


def check_tensors(reader: Reader, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compares digests of tensors with those that a run began with; one that the run did not read is not compared.

    Raises:
        UserError: names the first tensor that differs.
    """
    for name, digest in found.items():
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
        check_tensors(reader, expected, texts({name: words}))


def read_verified(reader: Reader, name: str, expected: Mapping[str, str]) -> np.ndarray:
    """Reads a whole tensor, and compares it; see :func:`verified_chunks`."""
    rows = [rows for _, rows in verified_chunks(reader, name, expected)]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)
