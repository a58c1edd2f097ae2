"""Hostile Parquet and Arrow files, by name."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import hostile_text as text
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MB = 1 << 20
CHATS = pa.table({"messages": [row["messages"] for row in text.GOOD]})
WORDS = pa.table({"text": pa.array(["tea", "milk", "tea", "sugar"] * 50).dictionary_encode()})
NUMBERS = pa.table({"input_ids": [[1, 2, 3]] * 64, "labels": [[-100, 2, 3]] * 64})


def parquet(table: Any, **options: Any) -> bytes:
    """The bytes of a Parquet file."""
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def ipc(table: Any, is_stream: bool = False, **options: Any) -> bytes:
    """The bytes of an Arrow file, or stream."""
    file = io.BytesIO()
    opened = (pa.ipc.new_stream if is_stream else pa.ipc.new_file)(
        file, table.schema, options=pa.ipc.IpcWriteOptions(allow_64bit=True, **options)
    )
    with opened:
        opened.write_table(table)
    return file.getvalue()


def seeds() -> dict[str, bytes]:
    """Good files, each with other encodings."""
    return {
        "chats.parquet": parquet(CHATS),
        "plain.parquet": parquet(CHATS, compression="none", use_dictionary=False),
        "zstd.parquet": parquet(CHATS, compression="zstd", data_page_version="2.0", write_page_index=True),
        "words.parquet": parquet(WORDS, row_group_size=50),
        "numbers.parquet": parquet(
            NUMBERS, column_encoding="DELTA_BINARY_PACKED", use_dictionary=False, compression="gzip"
        ),
        "chats.arrow": ipc(CHATS),
        "stream.arrow": ipc(CHATS, is_stream=True),
        "zstd.arrow": ipc(CHATS, compression="zstd"),
        "words.arrow": ipc(WORDS),
        "words stream.arrow": ipc(WORDS, is_stream=True, compression="lz4"),
    }


def built() -> Iterator[tuple[str, bytes]]:
    """Files that a writer has written, of arrays that are wrong."""
    for name, table in _arrays().items():
        yield f"{name}.arrow", ipc(table)
        yield f"{name} stream.arrow", ipc(table, is_stream=True)
    yield from _patched()
    yield "empty.parquet", b""
    yield "empty.arrow", b""
    yield "marks.parquet", b"PAR1PAR1"
    yield "marks.arrow", b"ARROW1\0\0ARROW1"
    yield "footer of 4 GB.parquet", b"PAR1" + b"\xff\xff\xff\xff" + b"PAR1"
    yield "encrypted.parquet", b"PARE" + bytes(64) + b"\x08\0\0\0PARE"
    yield "message of 2 GB.arrow", b"\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(64)
    yield "json.parquet", text.LINES
    yield "json.arrow", text.LINES
    yield "no columns.parquet", parquet(pa.table({}))
    yield "no rows.parquet", parquet(CHATS[:0])
    yield "no rows.arrow", ipc(CHATS[:0])
    yield "no messages.arrow", ipc(CHATS[:0], is_stream=True)
    deep: Any = pa.string()
    for _ in range(60):
        deep = pa.struct([("a", deep)])
    yield "deep.arrow", ipc(pa.table({"messages": pa.nulls(3, deep)}))
    many = pa.table({f"c{n}": ["a"] for n in range(5000)})
    yield "many columns.parquet", parquet(many)
    repeated = pa.DictionaryArray.from_arrays(np.zeros(4000, np.int32), ["a" * MB])
    yield "one text repeated.parquet", parquet(pa.table({"text": repeated}), dictionary_pagesize_limit=2 * MB)
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([1 << 40], pa.int64()), pa.array(["a"]))
    yield "run of 2^40 rows.arrow", ipc(pa.table({"text": runs}))
    yield "many nulls.arrow", ipc(pa.table({"text": _nulls(90_000)}))
    yield "2^40 nulls.arrow", ipc(pa.table({"text": _nulls(1 << 40)}))
    zeros = pa.FixedSizeListArray.from_arrays(_nulls(1 << 33), 1 << 30)
    yield "lists of 2^30 nulls.arrow", ipc(pa.table({"messages": zeros}))
    tokens = pa.table({"input_ids": pa.array([np.zeros(50 * MB, np.int32)]), "labels": pa.array([[1]])})
    yield "row of 50 million tokens.parquet", parquet(tokens, compression="zstd")
    yield "200 million rows.parquet", parquet(pa.table({"text": _nulls(200 * MB)}))
    footer = parquet(CHATS)
    yield "number of rows.parquet", _with_num_rows(footer)


def _arrays() -> dict[str, Any]:
    words = pa.array(["tea", "milk", "sugar"])
    dictionary = pa.DictionaryArray.from_arrays(pa.array([0, 9, -1], pa.int8()), words, safe=False)
    return {
        "indices out of range": pa.table({"text": dictionary}),
        "union": pa.table({"text": pa.UnionArray.from_sparse(pa.array([0, 0, 0], pa.int8()), [words])}),
        "json that is none": pa.table({"messages": pa.ExtensionArray.from_storage(pa.json_(), words)}),
        "dates": pa.table({"text": pa.array([1 << 60] * 3, pa.timestamp("s"))}),
        "decimals": pa.table({"input_ids": pa.array([[1], [2], [3]], pa.list_(pa.decimal128(38)))}),
        "half floats": pa.table({"input_ids": [[float("nan")]] * 3, "labels": [[1]] * 3}),
        "same names": pa.Table.from_arrays([words, words], names=["text", "text"]),
        "nan weights": pa.table(
            {
                "messages": [
                    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": x}]
                    for x in (float("nan"), float("inf"), -1.0)
                ]
            }
        ),
    }


def _patched() -> Iterator[tuple[str, bytes]]:
    """Files whose arrays no writer would write."""
    words = ipc(pa.table({"text": ["tea", "milk", "sugar"]}))
    for name, offsets in {
        "offsets beyond the end": [0, 3, 3, 1 << 30],
        "offsets that fall": [0, 9, 3, 12],
        "negative offsets": [-(1 << 30), 3, 5, 12],
    }.items():
        yield f"{name}.arrow", _replaced(words, _ints(0, 3, 7, 12), _ints(*offsets))
    yield "not utf-8.arrow", _replaced(words, b"teamilk", b"\xff\xfe\xfdmilk")
    lists = ipc(pa.table({"messages": [["a"] * 5, ["b"] * 6]}))
    yield "lists beyond the end.arrow", _replaced(lists, _ints(0, 5, 11), _ints(0, 1 << 30, 11))
    views = ipc(pa.table({"text": pa.array(["a text of more than twelve bytes"] * 3, pa.string_view())}))
    yield "views beyond the end.arrow", _replaced(views, b"a te" + _ints(0, 32), b"a te" + _ints(1000, 1 << 30))


def _ints(*values: int) -> bytes:
    return np.asarray(values, np.int32).tobytes()


def _replaced(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) == 1
    return content.replace(old, new)


def _nulls(size: int) -> Any:
    return pa.Array.from_buffers(pa.null(), size, [None])


def _with_num_rows(content: bytes) -> bytes:
    """Replace the 8 rows in the footer of a Parquet file, a Thrift integer of one byte, by 63."""
    size = int.from_bytes(content[-8:-4], "little")
    footer = content[-8 - size : -8].replace(b"\x16\x10", b"\x16\x7e")
    return content[: -8 - size] + footer + content[-8:]
