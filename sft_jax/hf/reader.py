"""Reading tensors of a safetensors folder range by range: one file, or several with an index."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import ml_dtypes
import numpy as np

from sft_jax.errors import UserError, refuse_lfs_pointer

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
CHUNK_BYTES = 64 * 2**20
_SAMPLED = 256  # bytes at the beginning and in the middle of a tensor, to tell it by
_BARE = "embed_tokens.weight"  # the token table of a checkpoint without prefix
_FIRST = 64  # bytes that tell a pointer of git-lfs
_MAX_HEADER = 100 * 2**20  # the limit that the safetensors library sets


def is_same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of one model; older versions' have names, shapes and dtypes only."""
    return one == other or (":" not in one and one == other.split(":")[0])


def is_other_weights(one: str, other: str) -> bool:
    """Whether two fingerprints are of models of one kind with different weights."""
    kinds, samples = zip(one.split(":"), other.split(":"), strict=True)
    return kinds[0] == kinds[1] and samples[0] != samples[1]


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies."""

    file: str
    dtype: str  # the format's name of it
    shape: tuple[int, ...]
    start: int  # in the file
    stop: int


def chunks(
    reader: TensorReader, name: str, first: int = 0, last: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """The rows ``first … last`` of a tensor, by default all, in parts of at most :data:`CHUNK_BYTES`, or a row.

    Yields:
        the number of each part's first row, and its rows.
    """
    num_rows, *rest = reader.shape(name)
    last = num_rows if last is None else last
    step = max(1, CHUNK_BYTES // max(1, math.prod(rest) * reader.dtype(name).itemsize))
    for start in range(first, last, step):
        yield start, reader.read(name, start, min(start + step, last))


class TensorReader:
    """The tensors of a folder by name; nothing is read before it is asked for, and then only what is asked for.

    Files are read and not mapped, so that what was read does not stay in memory, and by ranges, so that a bucket does
    as well as a disk.

    Args:
        folder: local, or a URL that fsspec knows, such as ``gs://bucket/model``.

    Raises:
        UserError: no safetensors, a damaged file, or an index that names a file that is not there.
    """

    def __init__(self, folder: Path | str, single: str = "model.safetensors"):
        self.folder = folder
        self._fs, self._root = fsspec.url_to_fs(str(folder))
        index = f"{single}.index.json"
        if self._fs.isfile(self._path(single)):
            files = [single]
        elif self._fs.isfile(self._path(index)):
            try:
                files = sorted(set(json.loads(self._fs.cat_file(self._path(index)))["weight_map"].values()))
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
                raise UserError(f"{folder}/{index}: not an index of safetensors files: {error!r}") from error
        else:
            files = self._without_index(single, index)
        self._entries: dict[str, _Entry] = {}
        self._open: dict[str, Any] = {}
        for name in files:
            if not self._fs.isfile(self._path(name)):
                raise UserError(f"{folder}/{name}: named in {index} but missing")
            self._entries |= self._header(name)
        if _BARE in self._entries:  # saved without the head's class, whose prefix the names lack
            self._entries = {
                name if name.startswith("lm_head.") else f"model.{name}": entry for name, entry in self._entries.items()
            }

    @property
    def names(self) -> set[str]:
        """All tensor names."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape as it is in the file."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """A tensor's dtype.

        Raises:
            UserError: not a floating-point dtype this library trains in.
        """
        code = self._entries[name].dtype
        if code not in DTYPES:
            raise UserError(f"{self.folder}: tensor {name} has dtype {code}; supported are {', '.join(DTYPES)}")
        return np.dtype(DTYPES[code])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The rows ``start … stop`` of a tensor's first dimension, by default all; no other bytes are read.

        Raises:
            UserError: the file ends before.
        """
        entry, dtype = self._entries[name], self.dtype(name)
        if not entry.shape:
            return self._bytes(entry, entry.start, entry.stop).view(dtype)[0]
        row = math.prod(entry.shape[1:]) * dtype.itemsize
        start, stop, _ = slice(start, stop).indices(entry.shape[0])
        raw = self._bytes(entry, entry.start + start * row, entry.start + stop * row)
        return raw.view(dtype).reshape(stop - start, *entry.shape[1:])

    def fingerprint(self) -> str:
        """Whether a folder still holds the same model: a hash of names, shapes and dtypes, and one of a few bytes of
        each tensor, with a colon between."""
        described = sorted((name, self.shape(name), str(self.dtype(name))) for name in self.names)
        kind = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
        files, starts, stops = [], [], []
        for name in sorted(self.names):
            entry = self._entries[name]
            for start in (entry.start, (entry.start + entry.stop) // 2):
                files.append(self._path(entry.file))
                starts.append(start)
                stops.append(min(start + _SAMPLED, entry.stop))
        sampled = hashlib.sha256()
        for found in self._fs.cat_ranges(files, starts, stops):
            sampled.update(found)
        return f"{kind}:{sampled.hexdigest()[:16]}"

    def _without_index(self, single: str, index: str) -> list[str]:
        """Shards that nothing but their names tells of."""
        names = [path.rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
        shards = sorted(name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name))
        if shards and single == "model.safetensors":
            return shards
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth")) and "model" in name]
        way_out = (
            f"; {pickles[0]} is a pickle, which could run code and is not opened: convert it once where you trust it, "
            "by AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT) of transformers"
            if pickles
            else ""
        )
        raise UserError(f"{self.folder}: no {single} and no {index}; weights are read from safetensors only{way_out}")

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _file(self, name: str) -> Any:
        if name not in self._open:
            # Ranges are as long as they should be; reading ahead would fetch what another process needs.
            self._open[name] = self._fs.open(self._path(name), "rb", cache_type="none")
        return self._open[name]

    def _bytes(self, entry: _Entry, start: int, stop: int) -> np.ndarray:
        file, raw = self._file(entry.file), np.empty(stop - start, np.uint8)
        file.seek(start)
        view, at = raw.data, 0
        while at < len(raw):
            count = file.readinto(view[at:])
            if not count:
                raise UserError(f"{self.folder}/{entry.file}: damaged safetensors file: it ends before its tensors do")
            at += count
        return raw

    def _header(self, name: str) -> dict[str, _Entry]:
        """Where the tensors of a file lie: eight bytes with the length of a JSON object that tells it."""

        def refuse(why: object) -> UserError:
            return UserError(f"{self.folder}/{name}: damaged safetensors file: {why}")

        size = self._fs.size(self._path(name))
        file = self._file(name)
        first = file.read(_FIRST)
        refuse_lfs_pointer(first, f"{self.folder}/{name}")
        length = int.from_bytes(first[:8], "little")
        file.seek(8)
        if not 0 < length <= min(_MAX_HEADER, size - 8):
            raise refuse(f"a header of {length} bytes in a file of {size}")
        try:
            described = json.loads(file.read(length))
            described.pop("__metadata__", None)
            entries = {}
            for tensor, one in described.items():
                start, stop = (8 + length + at for at in one["data_offsets"])
                entries[tensor] = _Entry(name, one["dtype"], tuple(one["shape"]), start, stop)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise refuse(repr(error)) from error
        for tensor, entry in entries.items():
            numbers = (*entry.shape, entry.start, entry.stop)
            if not all(isinstance(number, int) and number >= 0 for number in numbers) or entry.stop > size:
                raise refuse(f"tensor {tensor} lies outside of the file")
            if entry.dtype in DTYPES:
                wanted = math.prod(entry.shape) * np.dtype(DTYPES[entry.dtype]).itemsize
                if entry.stop - entry.start != wanted:
                    raise refuse(f"tensor {tensor} has {entry.stop - entry.start} bytes, its shape asks for {wanted}")
        return entries
