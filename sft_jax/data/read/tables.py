"""Reads ranges of rows from JSON Lines, JSON, CSV, Parquet and Arrow files, and from ``datasets``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from sft_jax.data.read.encodings import check_first_bytes
from sft_jax.data.read.rows import RowError
from sft_jax.data.read.text_files import JsonLines, decompressed, open_csv, open_json
from sft_jax.errors import UserError
from sft_jax.files.digests import file_digest

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
        path: ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.arrow``, also with ``.gz`` or ``.zst``.
        name: for error messages.

    Raises:
        UserError: the kind of file is unknown, or the file cannot be read.
    """
    opener = _OPENERS.get(kind_of(path.name))
    if opener is None:
        raise UserError(f"{name}: unknown kind of file {path.suffix!r}; supported are {', '.join(_OPENERS)}")
    try:
        if path.suffix in _COMPRESSED:
            path = decompressed(path, name)
        check_first_bytes(path, name)
        return opener(path, name)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {' '.join(str(error).split())[:200]}") from error


def kind_of(name: str) -> str:
    """Return the suffix of a file without compression: ``.jsonl`` for ``a.jsonl.gz``."""
    suffixes = Path(name).suffixes
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


class Parquet:
    """A Parquet file. Caches the last row group; a lock makes it thread-safe, which the reader of pyarrow is not."""

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
        self._cached: tuple[int, Any] = (-1, None)
        self._lock = Lock()

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def columns(self) -> list[str]:
        """Return the columns of the schema."""
        return self._file.schema_arrow.names

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        """Yield rows ``start … stop``, without the nulls that Arrow adds for keys of other rows."""
        stop = min(stop, len(self))
        while start < stop:
            group = int(np.searchsorted(self._offsets, start, side="right")) - 1
            with self._lock:
                if self._cached[0] != group:
                    self._cached = (group, self._file.read_row_group(group))
                cached = self._cached[1]
            first, end = int(self._offsets[group]), min(stop, int(self._offsets[group + 1]))
            yield from _arrow_rows(cached.slice(start - first, end - start))
            start = end

    def digest(self) -> str:
        """Return a hash of the file's bytes."""
        return file_digest(self.path)


class Arrow:
    """A memory-mapped Arrow file or stream, the storage format of ``datasets``."""

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

    def columns(self) -> list[str]:
        """Return the columns of the schema."""
        return self._table.schema.names

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        """Yield rows ``start … stop``, without the nulls that Arrow adds for keys of other rows."""
        yield from _arrow_rows(self._table.slice(start, min(stop, len(self)) - start))

    def digest(self) -> str:
        """Return a hash of the file's bytes."""
        return file_digest(self.path)


class Dataset:
    """A ``datasets.Dataset`` from the Hugging Face Hub or from disk."""

    def __init__(self, dataset: Any):
        self._dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def columns(self) -> list[str]:
        """Return the columns of the schema."""
        return self._dataset.column_names

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        """Yield rows ``start … stop``, without the nulls that Arrow adds for keys of other rows."""
        yield from _arrow_rows(self._dataset[start : min(stop, len(self))])

    def digest(self) -> str:
        """Return the fingerprint of the dataset."""
        return self._dataset._fingerprint

    def write(self, path: Path) -> None:
        """Write all rows to a Parquet file for other processes."""
        self._dataset.to_parquet(str(path))


def _arrow_rows(table: Any) -> Iterator[dict[str, Any] | RowError]:
    """Convert a table to rows. Decodes JSON, maps and bytes, and drops nulls that Arrow adds for keys of other rows."""
    import pyarrow as pa

    readers = {name: reader for name, kind in zip(table.schema.names, table.schema.types, strict=True)
               if (reader := _reader(kind)) is not None}  # fmt: skip

    def read(row: dict[str, Any]) -> dict[str, Any] | RowError:
        for name, reader in readers.items():
            if row[name] is None:
                continue
            try:
                row[name] = reader(row[name])
            except (ValueError, RecursionError) as error:
                return RowError(f"column {name!r} cannot be read: {' '.join(str(error).split())[:80]}")
        return row

    try:
        rows = table.to_pylist()
    except (UnicodeDecodeError, pa.ArrowInvalid):
        for i in range(table.num_rows):
            try:
                yield from map(read, table.slice(i, 1).to_pylist())
            except (UnicodeDecodeError, pa.ArrowInvalid) as error:
                yield RowError(f"cannot be read: {' '.join(str(error).split())[:80]}")
        return
    yield from map(read, rows)


def _reader(kind: Any) -> Callable[[Any], Any] | None:
    """Return a function that decodes values of an Arrow type; None if they need no decoding.

    Keeps nulls in JSON and maps; drops nulls in structs, since Arrow adds them for keys that only other rows have.
    """
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return json.loads if kind.extension_name == "arrow.json" else _reader(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _reader(kind.value_type)
    if any(is_kind(kind) for is_kind in _bytes_kinds()):
        return bytes.decode  # some writers store text as bytes
    if pa.types.is_map(kind):
        item_reader = _reader(kind.item_type)
        return lambda pairs: {key: _read(one, item_reader) for key, one in pairs}
    if pa.types.is_struct(kind):
        readers = {field.name: _reader(field.type) for field in kind}
        return lambda value: {
            name: _read(one, readers[name]) for name, one in value.items() if one is not None
        }  # fmt: skip
    if hasattr(kind, "value_type"):  # all list types
        value_reader = _reader(kind.value_type)
        return None if value_reader is None else lambda values: [_read(one, value_reader) for one in values]
    return None


def _bytes_kinds() -> list[Callable[[Any], bool]]:
    from pyarrow import types

    return [types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary]


def _read(value: Any, reader: Callable[[Any], Any] | None) -> Any:
    return value if value is None or reader is None else reader(value)


_OPENERS: dict[str, Callable[[Path, str], Table]] = {
    ".jsonl": JsonLines,
    ".json": open_json,
    ".csv": open_csv,
    ".parquet": Parquet,
    ".arrow": Arrow,
}
