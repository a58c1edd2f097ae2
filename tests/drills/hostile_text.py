"""Hostile JSON, JSON Lines, CSV and compressed files, by name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile
from collections.abc import Iterator

import pyarrow as pa

MB = 1 << 20
GOOD = [
    {"messages": [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": f"Yes, {n} cups."}]}
    for n in range(8)
]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in GOOD)
TABLE = b"question,answer\n" + b"".join(b"2+%d?,%d\n" % (n, n + 2) for n in range(8))
# What a value can be instead of what it should be.
_WRONG = {
    "null": "null",
    "number": "7",
    "huge number": "1" + "0" * 400,
    "infinity": "1e999",
    "nan": "NaN",
    "true": "true",
    "empty text": '""',
    "empty list": "[]",
    "empty object": "{}",
    "list of lists": "[[[]]]",
    "list of numbers": "[1, 2]",
    "object in a list": '[{"a": {"b": []}}]',
    "surrogate": r'"\ud800"',
    "nul": r'"\u0000"',
    "control": r'"\u001b[31m\r\n"',
}
# A row of each layout, whose `?` is replaced.
_LAYOUTS = {
    "messages": '{"messages": ?}',
    "message": '{"messages": [?, {"role": "assistant", "content": "b"}]}',
    "role": '{"messages": [{"role": "user", "content": "a"}, {"role": ?, "content": "b"}]}',
    "content": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ?}]}',
    "part": '{"messages": [{"role": "user", "content": [?]}, {"role": "assistant", "content": "b"}]}',
    "flag": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": ?}]}',
    "thoughts": '{"messages": [{"role": "user", "content": "a"}, '
    '{"role": "assistant", "content": "b", "reasoning_content": ?}]}',
    "calls": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": ?}]}',
    "call": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": ?}]}]}',
    "arguments": '{"messages": [{"role": "user", "content": "a"}, '
    '{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ?}}]}]}',
    "kwargs": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
    '"chat_template_kwargs": ?}',
    "tools": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": ?}',
    "tool": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
    '"tools": [{"type": "function", "function": ?}]}',
    "from": '{"conversations": [{"from": ?, "value": "a"}, {"from": "gpt", "value": "b"}]}',
    "value": '{"conversations": [{"from": "human", "value": ?}, {"from": "gpt", "value": "b"}]}',
    "output": '{"instruction": "a", "input": null, "output": ?}',
    "history": '{"instruction": "a", "output": "b", "history": ?}',
    "answer": '{"question": "a", "answer": ?}',
    "prompt": '{"prompt": ?, "completion": "b"}',
    "text": '{"text": ?}',
    "ids": '{"input_ids": ?, "labels": [1, 2]}',
    "labels": '{"input_ids": [1, 2], "labels": ?}',
    "masks": '{"input_ids": [1, 2], "assistant_masks": ?}',
    "attention": '{"input_ids": [1, 2], "labels": [1, 2], "attention_mask": ?}',
    "system": '{"system": ?, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
}


def wrong_values() -> Iterator[tuple[str, bytes]]:
    """A file for each field of each layout; its rows have all the wrong values, so `data.on_bad_row` can be skip."""
    for field, row in _LAYOUTS.items():
        yield f"{field}.jsonl", b"".join(row.replace("?", wrong).encode() + b"\n" for wrong in _WRONG.values())


def single_values() -> Iterator[tuple[str, bytes]]:
    """A file for each field of each layout and each wrong value."""
    for field, row in _LAYOUTS.items():
        for name, wrong in _WRONG.items():
            yield f"{field} {name}.jsonl", row.replace("?", wrong).encode() + b"\n"


def texts() -> Iterator[tuple[str, bytes]]:
    """Files that are not what their name says, in all the ways of text."""
    deep = 100_000
    rows = {
        "empty": b"",
        "blank": b" \n\t\n\r\n",
        "nul": b"\0" * 4096,
        "nul at the end": LINES + b"\0" * 100,
        "nul in the middle": LINES[:90] + b"\0" * 20 + LINES[110:],
        "bom": b"\xef\xbb\xbf" + LINES,
        "two boms": b"\xef\xbb\xbf\xef\xbb\xbf" + LINES,
        "utf-16": LINES.decode().encode("utf-16"),
        "utf-16 without mark": LINES.decode().encode("utf-16-le"),
        "utf-32": LINES.decode().encode("utf-32"),
        "cr only": LINES.replace(b"\n", b"\r"),
        "latin": '{"text": "Grüße"}\n'.encode("cp1252"),
        "deep list": b"[" * deep + b"]" * deep,
        "deep object": b'{"a":' * deep + b"1" + b"}" * deep,
        "deep and open": b"[" * deep,
        "deep row": b'{"messages": ' + b"[" * deep + b"]" * deep + b"}\n",
        "deep inside text": json.dumps({"messages": "[" * deep}).encode(),
        "deep tools": json.dumps({**GOOD[0], "tools": "[" * deep + "]" * deep}).encode(),
        "as deep as json allows": b'{"text": "a", "extra": ' + b"[" * 900 + b"]" * 900 + b"}\n",
        "deep arguments": json.dumps({**GOOD[0], "tools": [{"function": {"name": "f", "parameters": {}}}]})
        .encode()
        .replace(b"{}", b'{"a":' * 400 + b"1" + b"}" * 400),
        "digits": b'{"text": ' + b"9" * 100_000 + b"}\n",
        "duplicate keys": b'{"text": "a", "text": 7}\n',
        "many keys": json.dumps({str(n): None for n in range(50_000)}).encode(),
        "scalar": b"7\n",
        "string": b'"text"\n',
        "list of scalars": b"[1, 2, 3]",
        "list of lists": b"[[1], [2]]",
        "empty list": b"[]",
        "empty object": b"{}",
        "python": b"{'text': None}\n",
        "half a line": LINES[:-20],
        "html": b"<!DOCTYPE html><html><body>404</body></html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "pickle": b"\x80\x04\x95\x1b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "one row of many lists": b'{"text": "a", "extra": [' + b"[]," * (4 * MB) + b"[]]}\n",
        "many tiny rows": b"{}\n" * 300_000,
        "open string": b'{"text": "' + b"a" * (8 * MB),
        "backslashes": b'{"text": "' + b"\\" * MB,
        "long word": json.dumps({"text": "a" * (8 * MB)}).encode(),
        "long spaces": json.dumps({"text": " " * (8 * MB) + "a"}).encode(),
        "long marks": json.dumps({"text": "é́" * (2 * MB)}, ensure_ascii=False).encode(),
        "long chat": json.dumps(
            {"messages": [{"role": "user", "content": "a" * (4 * MB)}, {"role": "assistant", "content": "b" * MB}]}
        ).encode(),
        "long role": json.dumps(
            {"messages": [{"role": "u" * (4 * MB), "content": "a"}, {"role": "assistant", "content": "b"}]}
        ).encode(),
        "long key": json.dumps({"k" * (4 * MB): "a"}).encode(),
        "long rows": (json.dumps({"text": "a b " * (MB // 8)}).encode() + b"\n") * 12,
        "two thousand messages": json.dumps({"messages": GOOD[0]["messages"] * 1000}).encode(),
        "many empty messages": json.dumps({"messages": [{}] * 200_000}).encode(),
        "many short messages": json.dumps(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 10_000}
        ).encode(),
        "many tools": json.dumps(
            {**GOOD[0], "tools": [{"function": {"name": f"f{n}", "parameters": {"a": n}}} for n in range(3000)]}
        ).encode(),
        "many tokens": json.dumps({"input_ids": [5] * (2 * MB), "labels": [5] * (2 * MB)}).encode(),
        "huge tokens": b'{"input_ids": [1' + b"0" * 300 + b', 2], "labels": [-100, 2]}\n',
    }
    for name, content in rows.items():
        yield f"{name}.jsonl", content
    for name in ("empty", "blank", "nul", "two boms", "utf-16", "utf-32", "cr only", "deep list", "deep object",
                 "deep and open", "digits", "scalar", "list of scalars", "list of lists", "empty list", "empty object",
                 "half a line", "html", "long word", "one row of many lists", "many tiny rows"):  # fmt: skip
        yield f"{name}.json", rows[name]
    yield "extra data.json", b'{"text": "a"} {"text": "b"}'
    yield "lists of lists.json", b"[" + b"[]," * (8 * MB) + b"[]]"
    yield from tables()


def tables() -> Iterator[tuple[str, bytes]]:
    """Hostile CSV files."""
    for name, content in {
        "empty": b"",
        "header": b"question,answer\n",
        "same names": b"text,text\na,b\n",
        "short row": TABLE + b"alone\n",
        "long row": TABLE + b"a,b,c,d\n",
        "open quote": TABLE + b'"' + b"a" * (4 * MB),
        "quote in the middle": TABLE + b'a,"b"c\n',
        "nul": TABLE + b"a,\0b\n",
        "cr only": TABLE.replace(b"\n", b"\r"),
        "bom": b"\xef\xbb\xbf" + TABLE,
        "utf-16": TABLE.decode().encode("utf-16"),
        "latin": TABLE + "Größe?,1\n".encode("cp1252"),
        "json inside": b'messages\n"[{""role"": 7}]"\n',
        "deep inside": b"messages\n" + b"[" * 100_000 + b"\n",
        "long field": b"text\n" + b"a" * (8 * MB) + b"\n",
        "many columns": b",".join(b"c%d" % n for n in range(100_000)) + b"\n" + b"," * 99_999 + b"\n",
        "many names and rows": b",".join(b"column%d" % n for n in range(5000)) + (b"\n" + b"," * 4999) * 2000,
        "many lines": b"text\n" + b"\n" * 5_000_000,
        "separators": b"question;answer\n1+1?;2\n",
    }.items():
        yield f"{name}.csv", content
    yield "tabs.tsv", TABLE.replace(b",", b"\t")
    yield "plain.txt", b"hello\n"
    yield "no suffix", LINES


def archives() -> Iterator[tuple[str, bytes]]:
    """Compressed files, whole and damaged, and those that expand without end."""
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.jsonl", LINES)
    with tarfile.open(fileobj=tarred, mode="w:gz") as file:
        file.addfile(tarfile.TarInfo("a.jsonl"))
    spaces = b" " * (256 * MB)
    with_gzip, with_zstd = gzip.compress(LINES), pa.compress(LINES, codec="zstd", asbytes=True)
    yield "a.jsonl.bz2", bz2.compress(LINES)
    yield "a.jsonl.xz", lzma.compress(LINES)
    yield "a.jsonl.zip", zipped.getvalue()
    yield "a.zip", zipped.getvalue()
    yield "zip inside.jsonl.gz", gzip.compress(zipped.getvalue())
    yield "tar.jsonl.gz", tarred.getvalue()
    yield "twice.jsonl.gz", gzip.compress(with_gzip)
    yield "gzip as zst.jsonl.zst", with_gzip
    yield "plain as gz.jsonl.gz", LINES
    yield "empty.jsonl.gz", b""
    yield "empty.jsonl.zst", b""
    yield "nothing inside.jsonl.gz", gzip.compress(b"")
    yield "half.jsonl.gz", with_gzip[: len(with_gzip) // 2]
    yield "half.jsonl.zst", with_zstd[: len(with_zstd) // 2]
    yield "crc.jsonl.gz", with_gzip[:-8] + b"12345678"
    yield "more.jsonl.gz", with_gzip + b"more"
    yield "joined.jsonl.gz", with_gzip + gzip.compress(b'{"text": 7}\n')
    yield "bomb of spaces.jsonl.gz", gzip.compress(spaces, 1) * 24
    yield "bomb in a row.jsonl.gz", gzip.compress(b'{"text": "', 1) + gzip.compress(spaces, 1) * 24
    yield "bomb.json.zst", pa.compress(spaces, codec="zstd", asbytes=True) * 24
    yield "bomb.csv.gz", gzip.compress(b"text\n") + gzip.compress(spaces, 1) * 24
    yield "zeros.parquet.gz", gzip.compress(bytes(64 * MB), 1)


def mutated(name: str, content: bytes, num: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Truncate a file, flip bits in it, and overwrite parts with zeros, with 255 or with other parts of it."""
    stem, _, suffix = name.partition(".")
    for n in range(num):
        rng, changed = random.Random(f"{name} {seed} {n}"), bytearray(content)
        where = rng.randrange(len(changed))
        match n % 5:
            case 0:
                del changed[where:]
            case 1:
                for _ in range(rng.choice([1, 1, 2, 8])):
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            case 2:
                size = min(rng.choice([1, 4, 8, 64, 4096]), len(changed) - where)
                changed[where : where + size] = bytes(size)
            case 3:
                size = min(rng.choice([1, 2, 4, 8]), len(changed) - where)
                changed[where : where + size] = b"\xff" * size
            case _:
                size, origin = rng.choice([4, 8, 64]), rng.randrange(len(changed))
                changed[where : where + size] = changed[origin : origin + size]
        yield f"{stem} {seed} {n}.{suffix}", bytes(changed)
