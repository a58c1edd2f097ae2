"""Safetensors files and their index."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from hostile.variant import Make, Variant, text
from safetensors.numpy import load_file, save_file

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAME = "model.layers.1.mlp.up_proj.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def header(change: Callable[[dict], object], file: str = FILE) -> Make:
    """Changes the header of a file; what ``change`` returns is written as JSON, or as it is if it is bytes."""

    def make(folder: Path) -> None:
        raw = (folder / file).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        changed = change(json.loads(raw[8 : 8 + length]))
        described = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(described)) + described + raw[8 + length :])

    return make


def entry(file: str = FILE, name: str = NAME, **values) -> Make:
    """Changes what a header says of one tensor."""
    return header(lambda old: old | {name: old[name] | values}, file)


def tensors(change: Callable[[dict], object], file: str = FILE) -> Make:
    """Changes the tensors of a file, which is written as it should be."""

    def make(folder: Path) -> None:
        old = load_file(folder / file)
        change(old)
        save_file(old, folder / file)

    return make


def value(number: float, dtype: object = np.float32, name: str = NAME, file: str = FILE) -> Make:
    """Sets one weight."""

    def change(old: dict) -> None:
        old[name] = old[name].astype(dtype)
        old[name][-1, -1] = number

    return tensors(change, file)


def sharded(index: Callable[[dict[str, str]], object], then: Make | None = None) -> Make:
    """Splits the file in two with an index; ``index`` changes the map from tensors to files."""

    def make(folder: Path) -> None:
        old = load_file(folder / FILE)
        (folder / FILE).unlink()
        names = sorted(old)
        files = {name: SHARDS[i % 2] for i, name in enumerate(names)}
        for shard in SHARDS:
            save_file({name: old[name] for name in names if files[name] == shard}, folder / shard)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index(files)}))
        if then is not None:
            then(folder)

    return make


def raw(change: Callable[[bytes], bytes], file: str = FILE) -> Make:
    """Changes the bytes of a file."""
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def variants() -> Iterator[Variant]:
    """All of them."""
    yield from _headers(FILE, NAME, "train")
    yield Variant("weights generates", entry(dtype="F31"), "generate", (NAME,))
    yield Variant("weights checks", entry(shape=[2**40, 2**40]), "check", (FILE,))
    yield Variant("weights exports", entry(data_offsets=[-1, 3]), "export", (FILE,))
    for dtype in (np.float32, np.float16, np.float64):
        for number in (np.nan, np.inf, -np.inf):
            yield Variant(f"weights {number:g} in {dtype.__name__}", value(number, dtype), words=(NAME, "not finite"))
    yield Variant("weights out of float32", value(1e300, np.float64), words=(NAME, "not finite"))
    yield Variant("weights nan generates", value(np.nan), "generate", (NAME, "not finite"))
    yield Variant(
        "weights integers", tensors(lambda old: old.update({NAME: old[NAME].astype(np.int64)})), words=(NAME,)
    )
    yield Variant("weights scalar", tensors(lambda old: old.update({NAME: np.ones((), np.float32)})), words=(NAME,))
    yield Variant("weights renamed", tensors(lambda old: old.update({"a\n\x1b[31m": old.pop(NAME)})), words=(NAME,))
    yield Variant("weights without tensors", tensors(lambda old: old.clear()), words=("missing",))
    yield from _shards()


def _headers(file: str, name: str, command: str) -> Iterator[Variant]:
    """A file whose header is wrong."""

    def one(what: str, make: Make, *words: str) -> Variant:
        return Variant(f"{command} {file} {what}", make, command, (file, *words))

    def change(function: Callable[[dict], object]) -> Make:
        return header(function, file)

    for what, length in {"zero": 0, "1e18": 10**18, "largest": 2**64 - 1, "short": 9, "beyond": 10**7}.items():
        yield one(f"length {what}", raw(lambda data, n=length: struct.pack("<Q", n) + data[8:], file))
    for what, content in {"list": [], "null": None, "text": "a"}.items():
        yield one(f"header {what}", change(lambda _, content=content: content))
    yield one("header deep", change(lambda _: b"[" * 100_000))
    yield one("header deep objects", change(lambda _: b'{"a":' * 100_000 + b"1" + b"}" * 100_000))
    yield one("header not UTF-8", change(lambda _: b'{"\xff": 1}'))
    yield one("header digits", change(lambda _: b'{"a": ' + b"9" * 5000 + b"}"))
    yield one("header of lists", change(lambda _: b'{"a": [' + b"[]," * 5_000_000 + b"[]]}"))
    yield one("header 40 MB", change(lambda old: old | {"x": "y" * 40_000_000}))
    for key in ("dtype", "shape", "data_offsets") if command == "train" else ():
        for what, wrong in {
            "null": None,
            "text": "F99",
            "number": 7,
            "list": [[1], [2]],
            "negative": [-1, -1],
            "nan": [float("nan"), 1],
            "float": [0.0, 21504.0],
            "bool": [True, True],
            "huge": [10**18, 10**18],
            "huge digits": [10**4000] * 100,
            "many": [1] * 100_000,
            "none": [],
            "object": {"a": 1},
        }.items():
            make = change(lambda old, k=key, v=wrong: old | {name: old[name] | {k: v}})
            yield Variant(f"{command} {file} {key} {what}", make, command, (name,))
    yield one("no dtype", change(lambda old: old | {name: {"shape": [], "data_offsets": [0, 0]}}), name)
    yield one("entry null", change(lambda old: old | {name: None}), name)
    yield one("overlap", change(lambda old: old | {"copy": old[name]}))
    yield one("bomb", change(lambda old: old | {f"copy{i}": old[name] for i in range(10_000)}))
    yield one("hole", lambda folder: _with_hole(folder / file), "bytes after")
    yield one("gap", change(lambda old: {key: one for key, one in old.items() if key != name}))
    yield one("duplicate", change(lambda old: json.dumps(old)[:-1].encode() + f', "{name}": 1}}'.encode()), name)
    yield one("empty", text(file, b""))
    yield one("seven bytes", text(file, b"1234567"))
    yield one("zeros", text(file, bytes(10_000)))
    yield one("a page", text(file, "<html><body>404</body></html>"))
    yield one("pointer", text(file, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"), "git-lfs")
    yield one("truncated", raw(lambda data: data[:-1], file))
    yield one("half", raw(lambda data: data[: len(data) // 2], file))
    zero = {"dtype": "F32", "shape": [0, 10**12], "data_offsets": [0, 0]}
    yield Variant(f"{command} {file} zero-size", change(lambda old: {"empty": zero} | old), command, ("empty",))
    odd = {"a": [1], "b": None, "format": 3}
    yield Variant(f"{command} {file} metadata", change(lambda old: old | {"__metadata__": odd}), command, None)
    yield Variant(f"{command} {file} metadata null", change(lambda old: old | {"__metadata__": None}), command, None)


def _with_hole(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(64))


def _shards() -> Iterator[Variant]:
    yield Variant("index good", sharded(lambda files: files), words=None)
    yield Variant("no index", sharded(lambda files: files, lambda folder: (folder / INDEX).unlink()), words=None)
    wrong = {"list": [], "empty": {}, "null": None, "numbers": {NAME: 3}, "lists": {NAME: ["a"]}, "text": "a"}
    for what, content in wrong.items():
        yield Variant(f"index map {what}", sharded(lambda _, content=content: content), words=(INDEX,))
    paths = {
        "above": f"../{SHARDS[0]}",
        "absolute": "/etc/passwd",
        "null": "a\0b.safetensors",
        "dots": "..",
        "dot": ".",
    }
    paths |= {"long": "x" * 5000 + ".safetensors", "url": "file:///etc/passwd", "backslash": "..\\a.safetensors"}
    paths |= {"itself": INDEX, "config": "config.json", "none": "", "beside": f"./{SHARDS[0]}", "pickle": "model.bin"}
    for what, path in paths.items():
        words = ("x" * 50,) if what == "long" else (INDEX,)
        yield Variant(f"index {what}", sharded(lambda files, path=path: files | {NAME: path}), words=words)
    yield Variant("index missing shard", sharded(lambda files: files | {NAME: "model-3.safetensors"}), words=(INDEX,))
    extra = {f"tensor{i}": SHARDS[0] for i in range(200_000)}
    yield Variant("index of 200,000", sharded(lambda files: files | extra))
    for what, content in {"not JSON": "{", "deep": "[" * 100_000, "bytes": b'{"\xff": 1}', "page": "<html>"}.items():
        yield Variant(f"index {what}", sharded(lambda files: files, text(INDEX, content)), words=(INDEX,))

    def twice(folder: Path) -> None:
        save_file(load_file(folder / SHARDS[0]) | {NAME: np.zeros((112, 48), np.float32)}, folder / SHARDS[0])
        save_file(load_file(folder / SHARDS[1]) | {NAME: np.ones((112, 48), np.float32)}, folder / SHARDS[1])

    yield Variant("index a tensor twice", sharded(lambda files: files, twice), words=(NAME, *SHARDS))
    links = {"loop": SHARDS[0], "nowhere": "absent", "folder": ".", "device": "/dev/zero", "random": "/dev/urandom"}
    for what, target in links.items():
        yield Variant(f"shard links {what}", sharded(lambda files: files, _link(SHARDS[0], target)), words=(SHARDS[0],))
    yield Variant("shard pipe", sharded(lambda files: files, _pipe(SHARDS[0])), words=(SHARDS[0],))


def _link(name: str, target: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def _pipe(name: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make
