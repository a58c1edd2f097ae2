"""A process that reads Parquet and Arrow files, and data sets, for :mod:`sft_jax.data.read.arrow_files`.

Damaged or hostile files make Arrow crash, hang or allocate without end. Here that ends this process alone, whose memory
and time are limited. Only record batches that were validated in full leave it.

Requests are lines of JSON on stdin. A reply is a line of JSON, followed by as many bytes of an Arrow stream as it says.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from typing import Any, BinaryIO, Protocol

import pyarrow as pa

from sft_jax.data.read.limits import ARROW_BYTES, ARROW_ROWS, ARROW_SECONDS, EXPANSION, ROW_BYTES, ROW_VALUES
from sft_jax.files.hub_network import go_offline_without_network
from sft_jax.files.orphans import end_with_parent

_BYTES_PER_SECOND = 10_000_000
_BATCH = 1000  # rows of a reply
_REPLY_BYTES = 1 << 24
_REPLY_VALUES = 1 << 22
_WINDOW = 1 << 28  # bytes of decoded batches that are kept
# What Arrow and datasets raise for damaged files. Other exceptions end the process, which is reported as well.
FAULTS = (
    pa.ArrowException, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
    SystemError, AssertionError, NotImplementedError,
)  # fmt: skip


class Rows(Protocol):
    """The rows of a file."""

    num_rows: int
    columns: list[str]

    def batch(self, row: int, num_rows: int) -> tuple[int, Any]:
        """Return the number of the first row of a record batch that contains ``row``, and the batch.

        Args:
            num_rows: how many rows from there on are of use.
        """
        ...


class ParquetRows:
    """The rows of a Parquet file. Decodes a row group batch by batch, and keeps its last batches."""

    def __init__(self, path: str):
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(path, memory_map=True)
        metadata = self._file.metadata
        self._sizes = sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if min(sizes, default=0) < 0:
            raise ValueError("a row group has a negative number of rows")
        *self._starts, self.num_rows = accumulate(sizes, initial=0)
        self.columns = _names(self._file.schema_arrow)
        self._group, self._next = -1, 0
        self._batches: Iterator[Any] = iter(())
        self._kept: deque[tuple[int, Any]] = deque()

    def batch(self, row: int, num_rows: int) -> tuple[int, Any]:
        """Return the number of the first row of a record batch that contains ``row``, and the batch."""
        group = bisect_right(self._starts, row) - 1
        if group != self._group or (row < self._next and self._kept[0][0] > row):
            self._group, self._next = group, self._starts[group]
            self._kept.clear()
            size = self._file.metadata.row_group(group).total_byte_size // max(1, self._sizes[group])
            num_rows = max(1, min(_BATCH, _REPLY_BYTES // max(1, size)))
            self._batches = self._file.iter_batches(num_rows, row_groups=[group], use_threads=False)
        while self._next <= row:
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError(f"row group {group} has fewer rows than its metadata say")
            if batch.num_rows:
                self._kept.append((self._next, batch))
                self._next += batch.num_rows
            while len(self._kept) > 1 and sum(_num_bytes(one) for _, one in self._kept) > _WINDOW:
                self._kept.popleft()
        return next(one for one in reversed(self._kept) if one[0] <= row)


class ArrowRows:
    """The rows of a memory-mapped Arrow file or stream, the storage format of ``datasets``."""

    def __init__(self, path: str):
        mapped = pa.memory_map(path)
        try:
            reader = pa.ipc.open_stream(mapped)
            batches = list(reader)
            self._get = batches.__getitem__
        except pa.ArrowInvalid:
            mapped.seek(0)
            reader = pa.ipc.open_file(mapped)
            batches = map(reader.get_batch, range(reader.num_record_batches))
            self._get = reader.get_batch
        *self._starts, self.num_rows = accumulate((batch.num_rows for batch in batches), initial=0)
        self.columns = _names(reader.schema)

    def batch(self, row: int, num_rows: int) -> tuple[int, Any]:
        """Return the number of the first row of a record batch that contains ``row``, and the batch."""
        number = bisect_right(self._starts, row) - 1
        return self._starts[number], self._get(number)


class DatasetRows:
    """The rows of a ``datasets.Dataset``."""

    def __init__(self, dataset: Any):
        self._dataset = dataset.with_format("arrow")
        self.num_rows = len(dataset)
        self.columns = list(dataset.column_names)
        self.digest = str(dataset._fingerprint)

    def batch(self, row: int, num_rows: int) -> tuple[int, Any]:
        """Return the number of the first row of a record batch that contains ``row``, and the batch."""
        table = self._dataset[row : min(row + num_rows, self.num_rows)].combine_chunks()
        return row, table.to_batches()[0]

    def write(self, path: str) -> None:
        """Write all rows to a Parquet file."""
        self._dataset.to_parquet(path)


def _names(schema: Any) -> list[str]:
    """Return the names of the columns.

    Raises:
        UnicodeDecodeError: one of them, or the name of a field inside of a column, is not UTF-8.
    """

    def check(kind: Any) -> None:
        if isinstance(kind, pa.BaseExtensionType):
            return check(kind.storage_type)
        fields = [kind.field(i) for i in range(kind.num_fields)]
        for field in fields:
            str(field.name)
            check(field.type)

    for kind in schema.types:
        check(kind)
    return schema.names


def open_rows(kind: str, path: str, options: dict[str, Any]) -> Rows:
    """Open a file, a saved data set, or one of the Hugging Face Hub.

    Args:
        kind: ``parquet``, ``arrow``, ``saved`` or ``hub``.
        options: ``split``, and for the Hub ``name`` and ``revision``.

    Raises:
        ValueError: a saved data set has no such split.
    """
    if kind == "parquet":
        return ParquetRows(path)
    if kind == "arrow":
        return ArrowRows(path)
    if kind == "hub":
        go_offline_without_network()
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if kind == "hub":
        split, revision = options["split"], options["revision"]
        return DatasetRows(datasets.load_dataset(path, options["name"], split=split, revision=revision))
    loaded = datasets.load_from_disk(path)
    if isinstance(loaded, datasets.DatasetDict):
        if options["split"] not in loaded:
            raise ValueError(f"has no split {options['split']!r}; there are {', '.join(map(str, loaded))}")
        loaded = loaded[options["split"]]
    return DatasetRows(loaded)


def read(rows: Rows, row: int, num_rows: int) -> tuple[dict[str, Any], bytes]:
    """Read the next rows from ``row`` on; at most ``num_rows``, and at most as many as a reply may hold.

    Returns:
        The number of rows and why some of them cannot be used, and the others as an Arrow stream.
    """
    num_rows = min(num_rows, _BATCH)
    first, batch = rows.batch(row, num_rows)
    batch = _decoded(batch.slice(row - first, num_rows))
    while batch.num_rows > 1 and _is_large(batch, _REPLY_BYTES, _REPLY_VALUES):
        batch = batch.slice(0, batch.num_rows // 2)
    reply: dict[str, Any] = {"rows": batch.num_rows, "bad": {}}
    if _is_large(batch, ROW_BYTES, ROW_VALUES):
        reply["bad"] = {0: f"has more than {ROW_BYTES >> 20} MB, or {ROW_VALUES:,} values"}
        return reply, _as_stream(batch.slice(0, 0))
    try:
        return reply, _validated(batch)
    except pa.ArrowInvalid:
        good = []
        for i in range(batch.num_rows):
            try:
                _validated(batch.slice(i, 1))
                good.append(batch.slice(i, 1))
            except pa.ArrowInvalid as error:
                reply["bad"][i] = f"cannot be read: {' '.join(str(error).split())[:80]}"
    joined = pa.Table.from_batches(good, batch.schema).combine_chunks().to_batches() if good else []
    return reply, _validated(joined[0]) if joined else _as_stream(batch.slice(0, 0))


def _decoded(batch: Any) -> Any:
    """Decode dictionaries and runs, whose rows are small here but not as objects."""
    import pyarrow.compute as pc

    columns = []
    for column in batch.columns:
        if pa.types.is_dictionary(column.type):
            column.validate(full=True)
            column = column.dictionary_decode()
        elif pa.types.is_run_end_encoded(column.type):
            column.validate(full=True)
            column = pc.call_function("run_end_decode", [column])
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _validated(batch: Any) -> bytes:
    """Return a record batch as a stream, which is validated as it was written: a mapped file may change meanwhile.

    Raises:
        pa.ArrowInvalid: an offset, an index, a text or another value is invalid.
    """
    stream = _as_stream(batch)
    with pa.ipc.open_stream(stream) as reader:
        for one in reader:
            one.validate(full=True)
    return stream


def _as_stream(batch: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(allow_64bit=True)) as stream:
        stream.write_batch(batch)
    return sink.getvalue()


def _is_large(batch: Any, num_bytes: int, num_values: int) -> bool:
    return _num_bytes(batch) > num_bytes or sum(map(_num_values, batch.columns)) > num_values


def _num_bytes(batch: Any) -> int:
    try:
        return batch.nbytes
    except pa.ArrowException:  # of a few types, only the size of whole buffers is known
        return batch.get_total_buffer_size()


def _num_values(array: Any) -> int:
    """Return the number of values of an array, with those of its lists: nulls need no memory, but become objects."""
    kind, size = array.type, len(array)
    if isinstance(kind, pa.BaseExtensionType):
        return _num_values(array.storage)
    if pa.types.is_struct(kind):
        return size + sum(_num_values(array.field(i)) for i in range(kind.num_fields))
    if pa.types.is_fixed_size_list(kind):
        return size + size * kind.list_size
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind)) and size:
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        values = array.keys if pa.types.is_map(kind) else array.values
        return size + (_num_values(values.slice(first, last - first)) if 0 <= first <= last <= len(values) else 0)
    return size


class Server:
    """Answers requests."""

    def __init__(self, out: BinaryIO):
        self._out = out
        self._opened: dict[str, Rows] = {}
        self._memory = ARROW_BYTES

    def answer(self, request: dict[str, Any]) -> None:
        """Answer a request: ``open``, ``read`` or ``write``."""
        self._limit(request)
        payload = b""
        try:
            reply, payload = self._answered(request)
        except MemoryError:
            reply = {"error": f"needs more than {self._memory >> 20} MB of memory; write it with smaller row groups"}
        except FAULTS as error:
            reply = {"error": " ".join(str(error).split())[:200] or type(error).__name__}
        self._out.write(json.dumps({**reply, "bytes": len(payload)}).encode() + b"\n")
        self._out.write(payload)
        self._out.flush()

    def _answered(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        key = json.dumps([request["kind"], request["path"], request["options"]])
        if key not in self._opened:
            opened = open_rows(request["kind"], request["path"], request["options"])
            if request["kind"] != "hub" and opened.num_rows > max(ARROW_ROWS, EXPANSION * request["size"]):
                raise ValueError(
                    f"it says that it has {opened.num_rows:,} rows, but has only {request['size']:,} bytes"
                )
            self._opened[key] = opened
        rows = self._opened[key]
        match request["what"]:
            case "open":
                return {"rows": rows.num_rows, "columns": rows.columns, "digest": getattr(rows, "digest", "")}, b""
            case "write":
                assert isinstance(rows, DatasetRows)
                rows.write(request["to"])
                return {}, b""
            case _:
                return read(rows, request["row"], request["num_rows"])

    def _limit(self, request: dict[str, Any]) -> None:
        """Limit memory and time by the size of the file; the Hub's downloads may take any time."""
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        if request["kind"] == "hub":
            resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
            return
        size = request["size"]
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + ARROW_SECONDS + size // _BYTES_PER_SECOND
        soft = seconds if hard == resource.RLIM_INFINITY else min(seconds, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
        if request["what"] == "open":
            self._memory += size
            hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            if hard == resource.RLIM_INFINITY or hard > self._memory:
                with suppress(ValueError):  # not on every system
                    resource.setrlimit(resource.RLIMIT_DATA, (self._memory, hard))


def _serve() -> None:
    end_with_parent()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no reply
    server = Server(out)
    for line in sys.stdin.buffer:
        server.answer(json.loads(line))


if __name__ == "__main__":
    with suppress(BrokenPipeError, KeyboardInterrupt):
        _serve()
