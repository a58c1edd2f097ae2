"""Writes tensors to a Hugging Face folder as one file or as shards with an index, by ranges and in any order."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.hf.reader import BUFFER_DTYPES, DTYPES

SHARD_BYTES = 5 * 10**9
_CODES = {np.dtype(dtype): code for code, dtype in (DTYPES | BUFFER_DTYPES).items()}


@dataclass(frozen=True)
class Tensor:
    """Shape and dtype of a tensor to write."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """Writes the weights of a model folder: ``model.safetensors``, or shards with an index.

    Several processes can write one folder together: each writes its own files, and process 0 also writes the index.
    The context manager exits after all data is on disk.

    Args:
        tensors: all tensors of the folder by Hugging Face name.
        process, num_processes: index of this process, and number of processes.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        shard_bytes: int = SHARD_BYTES,
        process: int = 0,
        num_processes: int = 1,
    ):
        total = sum(tensor.num_bytes for tensor in tensors.values())
        shards = _shards(tensors, min(shard_bytes, -(-total // num_processes)))
        if len(shards) == 1:
            files = ["model.safetensors"]
        else:
            files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        self._tensors = tensors
        self._files: dict[str, tuple[Any, int]] = {}  # file and offset of each tensor of this process
        self._open = []
        with self._closing_on_error():
            for i, (file, names) in enumerate(zip(files, shards, strict=True)):
                if i % num_processes == process:
                    self._begin(folder / file, names)
        if len(shards) > 1 and process == 0:
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in sorted(names)}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that this process writes."""
        return sum(self._tensors[name].num_bytes for name in self._files)

    def owns(self, name: str) -> bool:
        """Whether this process writes a tensor."""
        return name in self._files

    def write(self, name: str, rows: np.ndarray, start: int = 0) -> None:
        """Writes the rows of a tensor from ``start`` on, by default all; they must have the dtype of the file."""
        file, offset = self._files[name]
        tensor = self._tensors[name]
        assert rows.dtype == tensor.dtype, (name, rows.dtype)
        assert rows.shape[1:] == tensor.shape[1:], (name, rows.shape)
        row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        file.seek(offset + start * row)
        file.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            return self._close_after_error()
        with self._closing_on_error():
            for file in self._open:
                file.flush()
                os.fsync(file.fileno())
                file.close()

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._close_after_error()
            raise

    def _close_after_error(self) -> None:
        """Closes all files; what cannot be written any more, to a full disk, is given up with them."""
        for file in self._open:
            with suppress(OSError):
                file.close()

    def _begin(self, path: Path, names: list[str]) -> None:
        """Writes a file's header and extends the file to its final size."""
        names = sorted(names, key=lambda name: (-self._tensors[name].dtype.itemsize, name))  # keeps tensors aligned
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            tensor = self._tensors[name]
            header[name] = {
                "dtype": _CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [at, at + tensor.num_bytes],
            }
            at += tensor.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("w+b")
        self._open.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
        for name in names:
            self._files[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])


def save_tensors(
    folder: Path, tensors: Mapping[str, Tensor], get: Callable[[str], np.ndarray], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes tensors one by one; ``get`` returns a tensor by name, and only one is in memory at a time."""
    with TensorWriter(folder, tensors, shard_bytes) as writer:
        for name in tensors:
            writer.write(name, get(name))


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Groups names in order into shards of at most ``shard_bytes``, with at least one tensor each."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.num_bytes
    return shards
