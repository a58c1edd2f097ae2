"""Reads JSON Lines, JSON and CSV files; memory does not grow with the number of rows in a JSON Lines file.

Rows are parsed one by one and never stored in Arrow columns, which would add the keys of all other rows to each row:
``"arguments": {"city": "Rome"}`` would become ``{"city": "Rome", "recipe": null}`` because another row calls another
tool.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.data.read.encodings import not_utf8
from sft_jax.data.read.folders import scratch_folder
from sft_jax.data.read.limits import EXPANSION, EXPANSION_BYTES, JSON_OBJECT_BYTES, ROW_BYTES
from sft_jax.data.read.rows import RowError
from sft_jax.errors import UserError
from sft_jax.files.digests import file_digest

_CHUNK = 1 << 24  # bytes read at a time
_JSON_SPACES = " \t\n\r"


class JsonLines:
    """A file with one JSON object per line. Indexes the lines once, and parses rows when they are read."""

    def __init__(self, path: Path, name: str):
        self.path, self._name = path, name
        self._version = _version(path.stat())
        self._starts, self._ends, self._numbers = _find_lines(path)

    def __len__(self) -> int:
        return len(self._starts)

    def columns(self) -> list[str]:
        """Return an empty list, because the file has no schema."""
        return []

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        """Yield rows ``start … stop``; yields an error for a malformed line."""
        stop = min(stop, len(self))
        while start < stop:
            first = int(self._starts[start])
            if self._ends[start] - first > ROW_BYTES:
                yield self._error(start, f"the row has more than {ROW_BYTES >> 20} MB")
                start += 1
                continue
            end = min(stop, max(start + 1, int(np.searchsorted(self._ends, first + _CHUNK, side="right"))))
            block = self._block(first, int(self._ends[end - 1]))
            for i in range(start, end):
                yield self._row(i, block[int(self._starts[i]) - first : int(self._ends[i]) - first])
            start = end

    def _block(self, first: int, end: int) -> bytes:
        """Read bytes ``first … end`` of the file, which must not have changed since its lines were found."""
        try:
            with self.path.open("rb") as file:
                file.seek(first)
                block = file.read(end - first)
                version = _version(os.fstat(file.fileno()))
        except OSError as error:
            raise UserError(f"{self._name}: cannot be read: {' '.join(str(error).split())[:200]}") from error
        if version != self._version or len(block) < end - first:
            raise UserError(f"{self._name}: was changed while it was read; run the command again")
        return block

    def _row(self, i: int, line: bytes) -> dict[str, Any] | RowError:
        try:
            row = json.loads(line.decode("utf-8-sig" if i == 0 else "utf-8"))
        except UnicodeDecodeError:
            return self._error(i, not_utf8(line))
        except json.JSONDecodeError as error:
            return self._error(i, f"not valid JSON: {error.msg} (column {error.colno})")
        except RecursionError:
            return self._error(i, "nested too deeply")
        except ValueError as error:  # for example a number with thousands of digits
            return self._error(i, f"not valid JSON: {str(error)[:80]}")
        return row if isinstance(row, dict) else self._error(i, "not a JSON object")

    def _error(self, row: int, reason: str) -> RowError:
        return RowError(reason, line=int(self._numbers[row]) + 1)

    def digest(self) -> str:
        """Return a hash of the file's bytes."""
        return file_digest(self.path)


def _version(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


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
    """Read a JSON file: a list of rows, a single row, or an object whose only list holds the rows."""
    text = _utf8(path, name)
    try:
        if text.lstrip(_JSON_SPACES).startswith("["):
            return _spooled(lambda write: [write(row) for row in _listed(text, name)], name)
        if len(text) > JSON_OBJECT_BYTES:
            raise UserError(
                f"{name}: an object of more than {JSON_OBJECT_BYTES >> 20} MB; write a list of rows instead"
            )
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text[: error.pos].strip().startswith("{"):
            return JsonLines(path, name)  # a JSON Lines file with the suffix .json
        raise UserError(f"{name}:{error.lineno}: not valid JSON: {error.msg}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON: {str(error)[:80]}") from error
    if not isinstance(rows, dict):
        raise UserError(f"{name}: must contain a list of objects, it contains a {type(rows).__name__}")
    lists = [value for value in rows.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    one_row = {"messages", "conversations", "instruction", "prompt", "text", "question"} & set(rows)
    rows = lists[0] if len(lists) == 1 and not one_row else [rows]
    return _spooled(lambda write: [write(_object(row, i, name)) for i, row in enumerate(rows)], name)


def _listed(text: str, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON list one by one, because the objects of a list need many times its size."""
    decoder, row = json.JSONDecoder(), 0
    at = _skip(text, _skip(text, 0) + 1)
    while text[at : at + 1] != "]":
        if row:
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = _skip(text, at + 1)
        begin = at
        value, at = decoder.raw_decode(text, at)
        if at - begin > ROW_BYTES:
            raise UserError(f"{name} row {row}: the row has more than {ROW_BYTES >> 20} MB")
        yield _object(value, row, name)
        at, row = _skip(text, at), row + 1
    if (at := _skip(text, at + 1)) < len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _skip(text: str, at: int) -> int:
    """Return the position of the next character that is no space."""
    while text[at : at + 1] in _JSON_SPACES and at < len(text):
        at += 1
    return at


def _object(row: Any, number: int, name: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{name} row {number}: not a JSON object")
    return row


def open_csv(path: Path, name: str) -> JsonLines:
    """Read a CSV file with a header, separated by commas, or semicolons or tabs if the header has no commas.

    Every value is a string; empty values are empty strings.
    """
    csv.field_size_limit(ROW_BYTES)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        delimiter = _delimiter(file.readline(ROW_BYTES))

    def fill(write: Callable[[Any], None]) -> None:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, delimiter=delimiter)
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


def _delimiter(header: str) -> str:
    """The delimiter of a CSV file by its first line.

    >>> [_delimiter(line) for line in ("a,b;c", "a;b", "a\\tb", "a", '"a;b",c')]
    [',', ';', '\\t', ',', ',']
    """
    counts = {one: len(next(csv.reader([header], delimiter=one), [])) for one in (",", ";", "\t")}
    return "," if counts[","] > 1 else max(counts, key=lambda one: counts[one])


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
        limit = max(EXPANSION_BYTES, EXPANSION * path.stat().st_size)
        with pa.input_stream(str(path), compression=codec) as source, target.open("wb") as file:
            while chunk := source.read(_CHUNK):
                file.write(chunk)
                if file.tell() > limit:
                    raise UserError(
                        f"{name}: expands to more than {limit >> 20} MB, {EXPANSION} times its size; if that is right, "
                        "decompress it yourself"
                    )
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
