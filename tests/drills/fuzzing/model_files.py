"""Targets that read the files of a model or an adapter."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

from attempt import Targets

from sft_jax.hf.reader import TensorReader

_folder = tempfile.TemporaryDirectory(prefix="sft-jax-fuzz-")
FOLDER = Path(_folder.name)


def _header(described: object, data: bytes = b"") -> bytes:
    text = json.dumps(described).encode()
    return struct.pack("<Q", len(text)) + text + data


def safetensors(data: bytes) -> None:
    """Reads all tensors of a file."""
    path = FOLDER / "model.safetensors"
    path.write_bytes(data)
    reader = TensorReader(FOLDER)
    for name in reader.names:
        reader.dtype(name)
        reader.read(name)
    reader.fingerprint()


TARGETS: Targets = {
    "safetensors": (
        safetensors,
        [
            _header({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}, bytes(16)),
            _header(
                {
                    "__metadata__": {"format": "pt"},
                    "a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
                    "b": {"dtype": "I64", "shape": [], "data_offsets": [4, 12]},
                    "c": {"dtype": "BOOL", "shape": [0, 3], "data_offsets": [12, 12]},
                },
                bytes(12),
            ),
        ],
    ),
}
