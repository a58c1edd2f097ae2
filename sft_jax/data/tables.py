"""Kinds of files as tables of rows, read a stretch at a time: memory does not grow with the number of rows.

JSON rows are parsed one by one and kept as they are written. They are not put into Arrow columns on the way, which
would fill every row with the keys of all others (an ``"arguments": {"city": "Rome"}`` would become
``{"city": "Rome", "recipe": null}`` because another row calls another tool).
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sft_jax.data.rows import RowError
from sft_jax.errors import UserError

_COMPRESSED = (".gz", ".zst")
_CHUNK = 1 << 24  # bytes read at a time


class Table(Protocol):
    """Rows that are read in stretches, at random."""

    def __len__(self) -> int:
        """How many rows."""
        ...

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        """Rows ``start … stop``; one that cannot be read is given as the reason why."""
        ...

    def digest(self) -> str:
        """A hash of the contents."""
        ...


def open_file(path: Path, name: str) -> Table:
    """The rows of a local file.

    Args:
        path: ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.arrow``; the first three also
            with ``.gz`` or ``.zst``.
        name: for error messages.

    Raises:
        UserError: an unknown kind of file, or one that cannot be read as what its name says.
    """
    opener = _OPENERS.get(kind_of(path.name))
    if opener is None:
        raise UserError(f"{name}: unknown kind of file {path.suffix!r}; supported are {', '.join(_OPENERS)}")
    try:
        if path.suffix in _COMPRESSED:
            path = _decompressed(path, name)
        return opener(path, name)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {' '.join(str(error).split())[:200]}") from error


def kind_of(name: str) -> str:
    """The ending that says what a file is: ``a.jsonl.gz`` is a ``.jsonl``."""
    suffixes = Path(name).suffixes
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


class JsonLines:
    """A file with one JSON object a line, read a stretch at a time and parsed when a row is read."""

    def __init__(self, path: Path, name: str):
        self.path = path
        self._starts, self._ends, self._numbers = _find_lines(path)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        """Rows ``start … stop``; a malformed line is given as the reason why."""
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
                yield self._error(i, "not valid UTF-8")
            except json.JSONDecodeError as error:
                yield self._error(i, f"not valid JSON: {error.msg} (column {error.colno})")
            except RecursionError:
                yield self._error(i, "nested too deeply")
            except ValueError as error:  # a number with thousands of digits
                yield self._error(i, f"not valid JSON: {str(error)[:80]}")
            else:
                yield row if isinstance(row, dict) else self._error(i, "not a JSON object")

    def _error(self, row: int, reason: str) -> RowError:
        return RowError(reason, line=int(self._numbers[row]) + 1)

    def digest(self) -> str:
        """A hash of the file's bytes."""
        return _file_digest(self.path)


def _find_lines(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the lines of a file that are not blank begin and end, and their numbers from 0."""
    breaks, size = [], 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
        ends = np.concatenate([*breaks, np.asarray([size], np.int64)]).astype(np.int64)
        starts = np.concatenate([[0], ends[:-1] + 1])
        kept = ends > starts
        for i in np.flatnonzero(
            kept & (ends - starts < 64)
        ):  # blanks alone are no row; longer lines are looked at later
            file.seek(int(starts[i]))
            kept[i] = bool(file.read(int(ends[i] - starts[i])).strip())
    return starts[kept], ends[kept], np.flatnonzero(kept)


class Parquet:
    """A Parquet file; the last row group read is kept."""

    def __init__(self, path: Path, name: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowInvalid, pa.ArrowException) as error:
            raise UserError(f"{name}: cannot be read as parquet: {' '.join(str(error).split())[:200]}") from error
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self._held: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        """Rows ``start … stop``, without the nulls that the columns of other rows have put into them."""
        start, stop = start, min(stop, len(self))
        while start < stop:
            group = int(np.searchsorted(self._offsets, start, side="right")) - 1
            if self._held[0] != group:
                self._held = (group, self._file.read_row_group(group))
            first, end = int(self._offsets[group]), min(stop, int(self._offsets[group + 1]))
            yield from _arrow_rows(self._held[1].slice(start - first, end - start))
            start = end

    def digest(self) -> str:
        """A hash of the file's bytes."""
        return _file_digest(self.path)


class Arrow:
    """An Arrow file or stream (what ``datasets`` keeps), mapped into memory."""

    def __init__(self, path: Path, name: str):
        import pyarrow as pa

        self.path = path
        mapped = pa.memory_map(str(path))
        try:
            self._table = pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            mapped.seek(0)
            try:
                self._table = pa.ipc.open_file(mapped).read_all()
            except pa.ArrowInvalid as error:
                raise UserError(f"{name}: cannot be read as arrow: {' '.join(str(error).split())[:200]}") from error

    def __len__(self) -> int:
        return self._table.num_rows

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        """Rows ``start … stop``, without the nulls that the columns of other rows have put into them."""
        yield from _arrow_rows(self._table.slice(start, min(stop, len(self)) - start))

    def digest(self) -> str:
        """A hash of the file's bytes."""
        return _file_digest(self.path)


class Dataset:
    """A ``datasets.Dataset``: of the Hugging Face hub, or saved to disk."""

    def __init__(self, dataset: Any):
        self._dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        """Rows ``start … stop``, without the nulls that the columns of other rows have put into them."""
        yield from _arrow_rows(self._dataset[start : min(stop, len(self))])

    def digest(self) -> str:
        """The dataset's own fingerprint."""
        return self._dataset._fingerprint

    def write(self, path: Path) -> None:
        """Write all rows as a Parquet file, which other processes can read."""
        self._dataset.to_parquet(str(path))


def _arrow_rows(table: Any) -> Iterator[dict[str, Any] | RowError]:
    import pyarrow as pa

    try:
        rows = table.to_pylist()
    except (UnicodeDecodeError, pa.ArrowInvalid):
        for i in range(table.num_rows):
            try:
                yield from map(_without_nulls, table.slice(i, 1).to_pylist())
            except (UnicodeDecodeError, pa.ArrowInvalid) as error:
                yield RowError(f"cannot be read: {' '.join(str(error).split())[:80]}")
        return
    yield from map(_without_nulls, rows)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return value


def _open_json(path: Path, name: str) -> Table:
    """A JSON file: a list of objects, one object that is a row, or one whose only list is of rows. Read whole."""
    text = _utf8(path, name)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text[: error.pos].strip().startswith("{"):
            return JsonLines(path, name)  # JSON lines by another name
        raise UserError(f"{name}:{error.lineno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON: {str(error)[:80]}") from error
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        one_row = {"messages", "conversations", "instruction", "prompt", "text", "question"} & set(rows)
        rows = lists[0] if len(lists) == 1 and not one_row else [rows]
    if not isinstance(rows, list):
        raise UserError(f"{name}: must hold a list of objects, it holds a {type(rows).__name__}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{name} row {i}: not a JSON object")
    return _spooled(lambda write: [write(row) for row in rows], name)


def _open_csv(path: Path, name: str) -> Table:
    """A CSV file with a header: every value is a string, and an empty one is empty."""
    csv.field_size_limit(sys.maxsize)

    def fill(write: Callable[[Any], None]) -> None:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                header = next(reader, [])
                if len(set(header)) < len(header):
                    raise UserError(f"{name}: two columns have the same name")
                for values in reader:
                    if values and len(values) != len(header):
                        raise UserError(f"{name}:{reader.line_num}: {len(values)} values, {len(header)} columns")
                    if values:
                        write(dict(zip(header, values, strict=True)))
            except csv.Error as error:
                raise UserError(f"{name}:{reader.line_num}: not valid CSV: {error}") from error
            except UnicodeDecodeError as error:
                raise UserError(f"{name}: not valid UTF-8: {error.reason}") from error

    return _spooled(fill, name)


def _spooled(fill: Callable[[Callable[[Any], None]], object], name: str) -> JsonLines:
    """Rows written as JSON lines into a temporary file."""
    path = _scratch() / f"{len(list(_scratch().iterdir()))}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        fill(lambda row: print(json.dumps(row), file=file))
    return JsonLines(path, name)


def _decompressed(path: Path, name: str) -> Path:
    import pyarrow as pa

    inner = Path(path.name).with_suffix("")
    target = _scratch() / f"{len(list(_scratch().iterdir()))}{inner.suffix}"
    try:
        codec = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
        with pa.input_stream(str(path), compression=codec) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, _CHUNK)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{name}: cannot be decompressed: {' '.join(str(error).split())[:200]}") from error
    return target


_temporary: list[tempfile.TemporaryDirectory] = []


def _scratch() -> Path:
    """A folder of this process, gone when it ends."""
    if not _temporary:
        _temporary.append(tempfile.TemporaryDirectory(prefix="sft-jax-"))
    return Path(_temporary[0].name)


def _utf8(path: Path, name: str) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{name}:{line}: not valid UTF-8") from error


def _file_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


_OPENERS: dict[str, Callable[[Path, str], Table]] = {
    ".jsonl": JsonLines,
    ".json": _open_json,
    ".csv": _open_csv,
    ".parquet": Parquet,
    ".arrow": Arrow,
}
