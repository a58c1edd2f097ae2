"""Reads JSON Lines, JSON and CSV files; memory does not grow with the number of rows in a JSON Lines file.

Rows are parsed one by one and never stored in Arrow columns, which would add the keys of all other rows to each row:
``"arguments": {"city": "Rome"}`` would become ``{"city": "Rome", "recipe": null}`` because another row calls another
tool.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.data.read.encodings import not_utf8
from sft_jax.data.read.folders import scratch_folder
from sft_jax.data.read.rows import RowError
from sft_jax.errors import UserError
from sft_jax.files.digests import file_digest

_CHUNK = 1 << 24  # bytes read at a time


class JsonLines:
    """A file with one JSON object per line. Indexes the lines once, and parses rows when they are read."""

    def __init__(self, path: Path, name: str):
        self.path = path
        self._starts, self._ends, self._numbers = _find_lines(path)

    def __len__(self) -> int:
        return len(self._starts)

    def columns(self) -> list[str]:
        """Return an empty list, because the file has no schema."""
        return []

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        """Yield rows ``start … stop``; yields an error for a malformed line."""
        stop = min(stop, len(self))
        if start >= stop:
            return
        first = int(self._starts[start])
        with self.path.open("rb") as file:
            file.seek(first)
            block = file.read(int(self._ends[stop - 1]) - first)
        for i in range(start, stop):
            line = block[int(self._starts[i]) - first : int(self._ends[i]) - first]
            try:
                row = json.loads(line.decode("utf-8-sig" if i == 0 else "utf-8"))
            except UnicodeDecodeError:
                yield self._error(i, not_utf8(line))
            except json.JSONDecodeError as error:
                yield self._error(i, f"not valid JSON: {error.msg} (column {error.colno})")
            except RecursionError:
                yield self._error(i, "nested too deeply")
            except ValueError as error:  # for example a number with thousands of digits
                yield self._error(i, f"not valid JSON: {str(error)[:80]}")
            else:
                yield row if isinstance(row, dict) else self._error(i, "not a JSON object")

    def _error(self, row: int, reason: str) -> RowError:
        return RowError(reason, line=int(self._numbers[row]) + 1)

    def digest(self) -> str:
        """Return a hash of the file's bytes."""
        return file_digest(self.path)


def _find_lines(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return start, end and 0-based number of all lines that are not blank."""
    breaks, size = [], 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
        ends = np.concatenate([*breaks, np.asarray([size], np.int64)]).astype(np.int64)
        starts = np.concatenate([[0], ends[:-1] + 1])
        is_row = ends > starts
        for i in np.flatnonzero(is_row & (ends - starts < 64)):  # skip whitespace; longer lines are not checked here
            file.seek(int(starts[i]))
            is_row[i] = bool(file.read(int(ends[i] - starts[i])).strip())
    return starts[is_row], ends[is_row], np.flatnonzero(is_row)


def open_json(path: Path, name: str) -> JsonLines:
    """Read a JSON file into memory: a list of rows, a single row, or an object whose only list holds the rows."""
    text = _utf8(path, name)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text[: error.pos].strip().startswith("{"):
            return JsonLines(path, name)  # a JSON Lines file with the suffix .json
        raise UserError(f"{name}:{error.lineno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON: {str(error)[:80]}") from error
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        one_row = {"messages", "conversations", "instruction", "prompt", "text", "question"} & set(rows)
        rows = lists[0] if len(lists) == 1 and not one_row else [rows]
    if not isinstance(rows, list):
        raise UserError(f"{name}: must contain a list of objects, it contains a {type(rows).__name__}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{name} row {i}: not a JSON object")
    return _spooled(lambda write: [write(row) for row in rows], name)


def open_csv(path: Path, name: str) -> JsonLines:
    """Read a CSV file with a header. Every value is a string; empty values are empty strings."""
    csv.field_size_limit(sys.maxsize)

    def fill(write: Callable[[Any], None]) -> None:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                header = next(reader, [])
                if len(set(header)) < len(header):
                    raise UserError(f"{name}: two columns of the header have the same name")
                for values in reader:
                    if values and len(values) != len(header):
                        raise UserError(f"{name}:{reader.line_num}: {len(values)} values, {len(header)} columns")
                    if values:
                        write(dict(zip(header, values, strict=True)))
            except csv.Error as error:
                raise UserError(f"{name}:{reader.line_num}: not valid CSV: {error}") from error
            except UnicodeDecodeError as error:
                raise UserError(f"{name}: {not_utf8(path.read_bytes())}") from error

    return _spooled(fill, name)


def _spooled(fill: Callable[[Callable[[Any], None]], object], name: str) -> JsonLines:
    """Write rows to a temporary JSON Lines file."""
    path = scratch_folder() / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        fill(lambda row: print(json.dumps(row), file=file))
    return JsonLines(path, name)


def decompressed(path: Path, name: str) -> Path:
    """Decompress a ``.gz`` or ``.zst`` file to a temporary file.

    Raises:
        UserError: the file cannot be decompressed.
    """
    import pyarrow as pa

    inner = Path(path.name).with_suffix("")
    target = scratch_folder() / inner.name
    try:
        codec = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
        with pa.input_stream(str(path), compression=codec) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, _CHUNK)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{name}: cannot be decompressed: {' '.join(str(error).split())[:200]}") from error
    return target


def _utf8(path: Path, name: str) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{name}:{line}: {not_utf8(data)}") from error
