"""Reads ranges of rows from JSON Lines, JSON, CSV, Parquet and Arrow files, and from ``datasets``."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from sft_jax.data.read.arrow_files import ArrowTable
from sft_jax.data.read.encodings import check_first_bytes
from sft_jax.data.read.rows import RowError
from sft_jax.data.read.text_files import JsonLines, decompressed, open_csv, open_json
from sft_jax.errors import UserError

_COMPRESSED = (".gz", ".zst")


class Table(Protocol):
    """Random access to ranges of rows."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def columns(self) -> list[str]:
        """Return the columns in the schema of the file; empty if it has no schema."""
        ...

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        """Yield rows ``start … stop``; yields an error for a row that cannot be read."""
        ...

    def digest(self) -> str:
        """Return a hash of the contents."""
        ...


def open_file(path: Path, name: str) -> Table:
    """Open a local file.

    Args:
        path: ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow``, also with ``.gz`` or ``.zst``.
        name: for error messages.

    Raises:
        UserError: the kind of file is unknown, or the file cannot be read.
    """
    opener = _OPENERS.get(kind_of(path.name))
    if opener is None:
        raise UserError(f"{name}: unknown kind of file {path.suffix!r}; supported are {', '.join(_OPENERS)}")
    try:
        _check_regular(path, name)
        if path.suffix in _COMPRESSED:
            path = decompressed(path, name)
        check_first_bytes(path, name)
        return opener(path, name)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {' '.join(str(error).split())[:200]}") from error


def _check_regular(path: Path, name: str) -> None:
    """Refuse what is no file: reading a FIFO waits for a writer, and a device may have no end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO, a device or a socket"
        raise UserError(f"{name}: is {kind}, not a file; remove it, or name the files")


def kind_of(name: str) -> str:
    """Return the suffix of a file without compression: ``.jsonl`` for ``a.jsonl.gz``."""
    suffixes = Path(name).suffixes
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


_OPENERS: dict[str, Callable[[Path, str], Table]] = {
    ".jsonl": JsonLines,
    ".json": open_json,
    ".csv": open_csv,
    ".tsv": open_csv,
    ".parquet": lambda path, name: ArrowTable(path, name, "parquet"),
    ".arrow": lambda path, name: ArrowTable(path, name, "arrow"),
}
