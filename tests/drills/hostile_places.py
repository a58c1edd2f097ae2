"""Hostile paths: FIFOs, links, folders, files that cannot be read, and saved data sets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import datasets
import hostile_arrow as arrow
import hostile_text as text


def _write(path: Path, content: bytes = text.LINES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _fifo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


def _link(path: Path, to: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)
    return path


def _folder_with_fifo(folder: Path) -> Path:
    _write(folder / "a.jsonl")
    _fifo(folder / "b.jsonl")
    return folder


def _folder_with_endless(folder: Path) -> Path:
    _write(folder / "a.jsonl")
    _link(folder / "b.json", "/dev/zero")
    return folder


def _folder_with_folder(folder: Path) -> Path:
    _write(folder / "a.jsonl")
    (folder / "b.jsonl").mkdir()
    return folder


def _folder_with_loop(folder: Path) -> Path:
    _write(folder / "a.jsonl")
    _link(folder / "b.jsonl", "b.jsonl")
    return folder


def _folder_with_itself(folder: Path) -> str:
    _write(folder / "deep" / "a.jsonl")
    _link(folder / "deep" / "again", "../deep")
    return f"{folder}/**/*.jsonl"


def _unreadable(folder: Path) -> Path:
    path = _write(folder / "a.jsonl")
    path.chmod(0)
    return path


def _saved(folder: Path, num: int = 0) -> Path:
    datasets.Dataset(arrow.CHATS).save_to_disk(str(folder / "saved"))
    if num:
        (data,) = (folder / "saved").glob("*.arrow")
        content = data.read_bytes()
        data.write_bytes([one for _, one in text.mutated("saved.arrow", content, num)][-1])
    return folder / "saved"


def _saved_with(name: str, content: bytes) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        _write(_saved(folder) / name, content)
        return folder / "saved"

    return build


def places() -> dict[str, Callable[[Path], Path | str]]:
    """What to give as `data.train`, as functions of an empty folder."""
    return {
        "fifo": lambda folder: _fifo(folder / "a.jsonl"),
        "fifo as parquet": lambda folder: _fifo(folder / "a.parquet"),
        "fifo in a folder": _folder_with_fifo,
        "fifo in a glob": lambda folder: f"{_folder_with_fifo(folder)}/*.jsonl",
        "zeros": lambda folder: _link(folder / "a.jsonl", "/dev/zero"),
        "zeros as json": lambda folder: _link(folder / "a.json", "/dev/zero"),
        "zeros as gzip": lambda folder: _link(folder / "a.jsonl.gz", "/dev/zero"),
        "zeros as csv": lambda folder: _link(folder / "a.csv", "/dev/zero"),
        "zeros as arrow": lambda folder: _link(folder / "a.arrow", "/dev/zero"),
        "zeros in a folder": _folder_with_endless,
        "random bytes": lambda folder: _link(folder / "a.jsonl", "/dev/urandom"),
        "null": lambda folder: _link(folder / "a.jsonl", "/dev/null"),
        "terminal": lambda folder: _link(folder / "a.jsonl", "/dev/tty"),
        "file of the kernel": lambda folder: _link(folder / "a.jsonl", "/proc/self/environ"),
        "memory of the process": lambda folder: _link(folder / "a.jsonl", "/proc/self/mem"),
        "link to itself": lambda folder: _link(folder / "a.jsonl", "a.jsonl"),
        "link to nothing": lambda folder: _link(folder / "a.jsonl", "nothing"),
        "link to itself in a folder": _folder_with_loop,
        "folder in itself": _folder_with_itself,
        "folder as a file": lambda folder: _write(folder / "a.jsonl" / "b.txt").parent,
        "folder in a folder": _folder_with_folder,
        "folder of nothing": lambda folder: folder,
        "not readable": _unreadable,
        "name of 5000 letters": lambda folder: "a" * 5000 + ".jsonl",
        "nul in the name": lambda folder: "a\0b.jsonl",
        "line break in the name": lambda folder: _write(folder / "a\nb.jsonl", b"{}\n"),
        "brackets": lambda folder: f"{folder}/[a-*.jsonl",
        "surrogate in the name": lambda folder: f"{folder}/\udcff.jsonl",
        "empty name": lambda folder: "",
        "url": lambda folder: "nothing://a/b.jsonl",
        "file url": lambda folder: f"file://{_fifo(folder / 'a.jsonl')}",
        "saved": _saved,
        **{f"saved, damaged {n}": lambda folder, n=n: _saved(folder, n) for n in range(1, 13)},
        "saved, state is a list": _saved_with("state.json", b"[]"),
        "saved, state is deep": _saved_with("state.json", b"[" * 100_000),
        "saved, state without files": _saved_with("state.json", b"{}"),
        "saved, state with strange files": _saved_with(
            "state.json", b'{"_data_files": [{"filename": "/dev/zero"}], "_fingerprint": 1}'
        ),
        "saved, info of numbers": _saved_with("dataset_info.json", b'{"features": 7}'),
        "saved, info of strange types": _saved_with(
            "dataset_info.json", b'{"features": {"messages": {"_type": "Value", "dtype": "nothing"}}}'
        ),
        "saved, dictionary of numbers": _saved_with("dataset_dict.json", b'{"splits": [7]}'),
    }
