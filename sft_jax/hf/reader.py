"""Reads tensors of a safetensors folder by ranges, from one file or from shards with an index."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import fsspec
import ml_dtypes
import numpy as np

from sft_jax.errors import UserError, refuse_lfs_pointer

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
# Dtypes of buffers outside of the decoder, such as the positions of image patches, which are copied.
BUFFER_DTYPES = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "BOOL": np.bool_}
_CODES = ("F8_E4M3", "U8")  # dtypes of one byte that only quantized checkpoints have
CHUNK_BYTES = 64 * 2**20
_SAMPLED = 256  # bytes at the start and in the middle of a tensor that the fingerprint hashes
_BARE = "embed_tokens.weight"  # name of the embeddings in a checkpoint without prefix
_FIRST = 64  # bytes that are enough to recognize a git-lfs pointer
_MAX_HEADER = 100 * 2**20  # limit of the safetensors library


def is_same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same model; those of older versions cover names, shapes and dtypes only."""
    return one == other or (":" not in one and one == other.split(":")[0])


def is_other_weights(one: str, other: str) -> bool:
    """Whether two fingerprints are of models with equal names, shapes and dtypes, but different weights."""
    kinds, samples = zip(one.split(":"), other.split(":"), strict=True)
    return kinds[0] == kinds[1] and samples[0] != samples[1]


@dataclass(frozen=True)
class _Entry:
    """The location of a tensor."""

    file: str
    dtype: str  # safetensors name
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    stop: int


class Reader(Protocol):
    """Reads the weights of a model by name, see :class:`TensorReader`."""

    @property
    def folder(self) -> Path | str: ...
    @property
    def names(self) -> set[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> np.dtype: ...
    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray: ...
    def fingerprint(self) -> str: ...


def chunks(reader: Reader, name: str, first: int = 0, last: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Reads the rows ``first … last`` of a tensor, by default all, in chunks of at most :data:`CHUNK_BYTES` or one row.

    Yields:
        the index of each chunk's first row, and the chunk.
    """
    num_rows, *rest = reader.shape(name) or (1,)  # a scalar is one row
    last = num_rows if last is None else last
    step = max(1, CHUNK_BYTES // max(1, math.prod(rest) * reader.dtype(name).itemsize))
    for start in range(first, last, step):
        yield start, np.atleast_1d(reader.read(name, start, min(start + step, last)))


class TensorReader:
    """Reads the tensors of a folder by name; the constructor reads only the headers.

    Files are read rather than memory-mapped, so that their pages do not stay in memory, and by ranges, so that a bucket
    works like a disk.

    Args:
        folder: a local folder or an fsspec URL such as ``gs://bucket/model``.

    Raises:
        UserError: no safetensors, a damaged file, or an index that names a missing file.
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
                raise UserError(f"{folder}/{index}: not a valid safetensors index: {error!r}") from error
        else:
            files = self._without_index(single, index)
        self._entries: dict[str, _Entry] = {}
        self._open: dict[str, Any] = {}
        for name in files:
            if not self._fs.isfile(self._path(name)):
                raise UserError(f"{folder}/{name}: named in {index} but missing")
            self._entries |= self._header(name)
        if _BARE in self._entries:  # saved from the model without lm_head: the names lack the prefix "model."
            self._entries = {
                name if name.startswith("lm_head.") else f"model.{name}": entry for name, entry in self._entries.items()
            }

    @property
    def names(self) -> set[str]:
        """All tensor names."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape in the file."""
        return self._entries[name].shape

    def code(self, name: str) -> str:
        """The safetensors name of a tensor's dtype, whether it is supported or not."""
        return self._entries[name].dtype

    def dtype(self, name: str) -> np.dtype:
        """A tensor's dtype.

        Raises:
            UserError: a dtype that neither weights nor buffers have.
        """
        code = self.code(name)
        if code not in DTYPES | BUFFER_DTYPES:
            raise UserError(f"{self.folder}: tensor {name} has dtype {code}; supported are {', '.join(DTYPES)}")
        return np.dtype((DTYPES | BUFFER_DTYPES)[code])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads only the rows ``start … stop`` of a tensor's first dimension, by default all.

        Raises:
            UserError: the file is truncated.
        """
        return self._rows(name, self.dtype(name), start, stop)

    def read_codes(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Like :meth:`read`, for the codes and scales of quantized weights with a dtype of one byte; as uint8."""
        assert self.code(name) in _CODES, (name, self.code(name))
        return self._rows(name, np.dtype(np.uint8), start, stop)

    def _rows(self, name: str, dtype: np.dtype, start: int, stop: int | None) -> np.ndarray:
        entry = self._entries[name]
        if not entry.shape:
            return self._bytes(entry, entry.start, entry.stop).view(dtype)[0]
        row = math.prod(entry.shape[1:]) * dtype.itemsize
        start, stop, _ = slice(start, stop).indices(entry.shape[0])
        raw = self._bytes(entry, entry.start + start * row, entry.start + stop * row)
        return raw.view(dtype).reshape(stop - start, *entry.shape[1:])

    def fingerprint(self, coded: Collection[str] = ()) -> str:
        """Returns two hashes joined by a colon: of names, shapes and dtypes, and of a few bytes of each tensor.

        Args:
            coded: the tensors of quantized weights, whose dtypes need not be supported.
        """
        dtypes = {name: self.code(name) if name in coded else str(self.dtype(name)) for name in self.names}
        described = sorted((name, self.shape(name), dtype) for name, dtype in dtypes.items())
        kind = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
        files, starts, stops = [], [], []
        for name in sorted(self.names):
            entry = self._entries[name]
            for start in (entry.start, (entry.start + entry.stop) // 2):
                files.append(self._path(entry.file))
                starts.append(start)
                stops.append(min(start + _SAMPLED, entry.stop))
        sampled = hashlib.sha256()
        for data in self._fs.cat_ranges(files, starts, stops):
            sampled.update(data)
        return f"{kind}:{sampled.hexdigest()[:16]}"

    def _without_index(self, single: str, index: str) -> list[str]:
        """Finds shards by their file names."""
        names = [path.rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
        shards = sorted(name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name))
        if shards and single == "model.safetensors":
            return shards
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth")) and "model" in name]
        way_out = (
            f"; {pickles[0]} is a pickle, which could run code and is not opened; if you trust it, convert it once "
            "with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT)"
            if pickles
            else ""
        )
        raise UserError(f"{self.folder}: no {single} and no {index}; weights are read from safetensors only{way_out}")

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _file(self, name: str) -> Any:
        if name not in self._open:
            # No read-ahead: it would download ranges that only another process needs.
            self._open[name] = self._fs.open(self._path(name), "rb", cache_type="none")
        return self._open[name]

    def _bytes(self, entry: _Entry, start: int, stop: int) -> np.ndarray:
        file, raw = self._file(entry.file), np.empty(stop - start, np.uint8)
        file.seek(start)
        view, at = raw.data, 0
        while at < len(raw):
            count = file.readinto(view[at:])
            if not count:
                raise UserError(f"{self.folder}/{entry.file}: damaged safetensors file: it ends before its last tensor")
            at += count
        return raw

    def _header(self, name: str) -> dict[str, _Entry]:
        """Reads the header of a file: eight bytes with a length, then a JSON object of that length."""

        def damaged(reason: object) -> UserError:
            return UserError(f"{self.folder}/{name}: damaged safetensors file: {reason}")

        size = self._fs.size(self._path(name))
        file = self._file(name)
        first = file.read(_FIRST)
        refuse_lfs_pointer(first, f"{self.folder}/{name}")
        length = int.from_bytes(first[:8], "little")
        file.seek(8)
        if not 0 < length <= min(_MAX_HEADER, size - 8):
            raise damaged(f"a header of {length} bytes in a file of {size}")
        try:
            described = json.loads(file.read(length))
            described.pop("__metadata__", None)
            entries = {}
            for tensor, one in described.items():
                start, stop = (8 + length + at for at in one["data_offsets"])
                entries[tensor] = _Entry(name, one["dtype"], tuple(one["shape"]), start, stop)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise damaged(repr(error)) from error
        for tensor, entry in entries.items():
            numbers = (*entry.shape, entry.start, entry.stop)
            if not all(isinstance(number, int) and number >= 0 for number in numbers) or entry.stop > size:
                raise damaged(f"tensor {tensor} lies outside of the file")
            sizes = DTYPES | BUFFER_DTYPES | dict.fromkeys(_CODES, np.uint8)
            if entry.dtype in sizes:
                expected = math.prod(entry.shape) * np.dtype(sizes[entry.dtype]).itemsize
                if entry.stop - entry.start != expected:
                    raise damaged(f"tensor {tensor} has {entry.stop - entry.start} bytes, its shape needs {expected}")
        return entries
