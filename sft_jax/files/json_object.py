"""Reads a JSON object that someone else wrote: of any size, kind, encoding and depth."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, BinaryIO

from sft_jax.errors import UserError

MOST_BYTES = 16 * 2**20  # of a file of settings; the longest are those of tokenizers with many added tokens


def read_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        UserError: no such file, or none that can be read; more than ``most_bytes``; not a JSON object in UTF-8.
    """
    return parse_object(read_bytes(path, most_bytes), path)


def read_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """Reads a file; errors are those of :func:`open_file`."""
    with open_file(path, most_bytes) as file:
        return file.read()


def open_file(path: Path, most_bytes: int = MOST_BYTES) -> BinaryIO:
    """Opens a file to read it, but neither a pipe, which may never end, nor one of more than ``most_bytes``.

    Raises:
        UserError: no such file, or none that can be read, or a larger one.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a file; put a copy of the file there")
        check_size(status.st_size, path, most_bytes)
        return path.open("rb")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the file and its permissions") from error


def check_size(num_bytes: int, name: object, most_bytes: int = MOST_BYTES) -> None:
    """Checks the size of a file before it is read.

    Raises:
        UserError: it is larger than ``most_bytes``.
    """
    if num_bytes > most_bytes:
        raise UserError(
            f"{name}: has {num_bytes:,} bytes, and at most {most_bytes:,} are read; get the file from its source again"
        )


def parse_object(content: bytes, name: object) -> dict[str, Any]:
    """Parses a JSON object; of equal keys the last one counts, as in other libraries.

    Args:
        name: of the file, for error messages.

    Raises:
        UserError: not a JSON object in UTF-8.
    """
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise UserError(f"{name}: not valid JSON: too many brackets inside each other") from error
    except ValueError as error:  # also of bytes that are not UTF-8, and of numbers with thousands of digits
        raise UserError(f"{name}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{name}: not a JSON object")
    return value
