"""Converts Arrow tables to rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from sft_jax.data.read.rows import RowError


def arrow_rows(table: Any) -> Iterator[dict[str, Any] | RowError]:
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

    faults = (ValueError, OverflowError, pa.ArrowException)  # of values that Python cannot hold, such as a year 40000
    try:
        rows = table.to_pylist()
    except faults:
        for i in range(table.num_rows):
            try:
                yield from map(read, table.slice(i, 1).to_pylist())
            except faults as error:
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
