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
from sft_jax.files.json_object import check_size, parse_object

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
# Dtypes of buffers outside of the decoder, such as the positions of image patches, which are copied.
BUFFER_DTYPES = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "BOOL": np.bool_}
_CODES = ("F8_E4M3", "U8")  # dtypes of one byte that only quantized checkpoints have
_ITEM_BYTES = {code: np.dtype(dtype).itemsize for code, dtype in (DTYPES | BUFFER_DTYPES).items()} | dict.fromkeys(
    _CODES, 1
)
CHUNK_BYTES = 64 * 2**20
_SAMPLED = 256  # bytes at the start and in the middle of a tensor that the fingerprint hashes
_MOST_DIMS = 8
_BARE = "embed_tokens.weight"  # name of the embeddings in a checkpoint without prefix
_FIRST = 64  # bytes that are enough to recognize a git-lfs pointer
MOST_HEADER_BYTES = 32 * 2**20  # of a header or an index: 200,000 tensors; once parsed they are twenty times as large


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

    Attributes:
        metadata: what the headers say besides tensors.

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
            files = self._shards(index)
        else:
            files = self._without_index(single, index)
        self.metadata: dict[str, Any] = {}
        self._entries: dict[str, _Entry] = {}
        self._open: dict[str, Any] = {}
        for name in files:
            if not self._fs.isfile(self._path(name)):
                raise UserError(f"{folder}/{name}: named in {index} but missing")
            entries = self._header(name)
            if twice := min(self._entries.keys() & entries, default=None):
                raise UserError(f"{folder}: tensor {twice} is both in {self._entries[twice].file} and in {name}")
            self._entries |= entries
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

    def _shards(self, index: str) -> list[str]:
        """Reads the file names in an index."""
        where = f"{self.folder}/{index}"
        check_size(self._fs.size(self._path(index)), where, MOST_HEADER_BYTES)
        files = parse_object(self._fs.cat_file(self._path(index)), where).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise UserError(f"{where}: not a valid safetensors index: it has no weight_map from tensors to files")
        for name in files.values():
            # A name is that of a file beside the index: a path could lead to any file of this machine.
            if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
                raise UserError(f"{where}: names the file {str(name)[:80]!r}, which is no safetensors file beside it")
        return sorted(set(files.values()))

    def _without_index(self, single: str, index: str) -> list[str]:
        """Finds shards by their file names."""
        names = [path.rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
        shards = sorted(name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name))
        if shards and single == "model.safetensors":
            return shards
        gguf = [name for name in names if name.lower().endswith(".gguf")]
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth")) and "model" in name]
        way_out = (
            f"; {pickles[0]} is a pickle, which could run code and is not opened; if you trust it, convert it once "
            "with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT)"
            if pickles
            else f"; {gguf[0]} is GGUF, which is not read: use the model that it was made from"
            if gguf
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
        if not 0 < length <= min(MOST_HEADER_BYTES, size - 8):
            raise damaged(f"a header of {length} bytes in a file of {size}, and at most {MOST_HEADER_BYTES} are read")
        described = parse_object(file.read(length), f"{self.folder}/{name}: damaged safetensors file")
        if isinstance(metadata := described.pop("__metadata__", None), dict):
            self.metadata |= metadata
        entries = {}
        for tensor, one in described.items():
            match one:
                case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop]}:
                    numbers = (*shape, start, stop)
                case _:
                    raise damaged(f"tensor {tensor} lacks its dtype, shape or data_offsets")
            if not all(type(number) is int and 0 <= number < 2**48 for number in numbers) or 8 + length + stop > size:
                raise damaged(f"tensor {tensor} lies outside of the file")
            if len(shape) > _MOST_DIMS:
                raise damaged(f"tensor {tensor} has {len(shape)} dimensions, and at most {_MOST_DIMS} are read")
            if dtype in _ITEM_BYTES:
                expected = math.prod(shape) * _ITEM_BYTES[dtype]
                if stop - start != expected:
                    raise damaged(f"tensor {tensor} has {stop - start} bytes, its shape needs {expected}")
            entries[tensor] = _Entry(name, dtype, tuple(shape), 8 + length + start, 8 + length + stop)
        end, previous = 8 + length, "the header"
        for tensor, entry in sorted(entries.items(), key=lambda one: (one[1].start, one[1].stop)):
            if entry.start != end:  # as in the safetensors library; what overlaps could fill any memory
                raise damaged(f"tensor {tensor} does not begin where {previous} ends")
            end, previous = entry.stop, f"tensor {tensor}"
        if end != size:
            raise damaged(f"{size - end} bytes after its last tensor")
        return entries
