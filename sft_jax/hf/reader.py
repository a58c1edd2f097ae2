"""Reading tensors of a safetensors folder range by range: one file, or several with an index."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sft_jax.errors import UserError

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}


class TensorReader:
    """The tensors of ``folder`` by name; nothing is read before it is asked for.

    Raises:
        UserError: no safetensors, a damaged file, or an index that names a file that is not there.
    """

    def __init__(self, folder: Path, single: str = "model.safetensors"):
        self.folder = folder
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            files = [single]
        elif index.is_file():
            try:
                files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
                raise UserError(f"{index}: not an index of safetensors files: {error!r}") from error
        else:
            raise UserError(f"{folder}: no {single} and no {index.name}; weights are read from safetensors only")
        self._files: dict[str, Any] = {}
        for name in files:
            if not (folder / name).is_file():
                raise UserError(f"{folder / name}: named in {index.name} but missing")
            try:
                handle = safe_open(folder / name, framework="numpy")
            except SafetensorError as error:
                raise UserError(f"{folder / name}: damaged safetensors file: {error}") from error
            self._files |= dict.fromkeys(handle.keys(), handle)

    @property
    def names(self) -> set[str]:
        """All tensor names."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape as it is in the file."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """A tensor's dtype.

        Raises:
            UserError: not a floating-point dtype this library trains in.
        """
        code = self._files[name].get_slice(name).get_dtype()
        if code not in _DTYPES:
            raise UserError(f"{self.folder}: tensor {name} has dtype {code}; supported are {', '.join(_DTYPES)}")
        return np.dtype(_DTYPES[code])

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it that ``index`` selects; only that part is read from disk."""
        if not index:
            return self._files[name].get_tensor(name)
        return self._files[name].get_slice(name)[index]

    def fingerprint(self) -> str:
        """A short hash of names, shapes and dtypes: whether a folder still holds the same kind of model."""
        described = sorted((name, self.shape(name), str(self.dtype(name))) for name in self.names)
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
