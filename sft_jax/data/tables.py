"""Kinds of files as tables of rows, read a stretch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from sft_jax.data.rows import RowError
from sft_jax.data.text_files import JsonLines, decompressed, file_digest, open_csv, open_json
from sft_jax.errors import UserError

_COMPRESSED = (".gz", ".zst")


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
            path = decompressed(path, name)
        return opener(path, name)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {' '.join(str(error).split())[:200]}") from error


def kind_of(name: str) -> str:
    """The ending that says what a file is: ``a.jsonl.gz`` is a ``.jsonl``."""
    suffixes = Path(name).suffixes
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


class Parquet:
    """A Parquet file; the last row group read is kept. Threads may share it, the reader of pyarrow may not be."""

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
        self._lock = Lock()

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        """Rows ``start … stop``, without the nulls that the columns of other rows have put into them."""
        start, stop = start, min(stop, len(self))
        while start < stop:
            group = int(np.searchsorted(self._offsets, start, side="right")) - 1
            with self._lock:
                if self._held[0] != group:
                    self._held = (group, self._file.read_row_group(group))
                held = self._held[1]
            first, end = int(self._offsets[group]), min(stop, int(self._offsets[group + 1]))
            yield from _arrow_rows(held.slice(start - first, end - start))
            start = end

    def digest(self) -> str:
        """A hash of the file's bytes."""
        return file_digest(self.path)


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
        return file_digest(self.path)


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


_OPENERS: dict[str, Callable[[Path, str], Table]] = {
    ".jsonl": JsonLines,
    ".json": open_json,
    ".csv": open_csv,
    ".parquet": Parquet,
    ".arrow": Arrow,
}
