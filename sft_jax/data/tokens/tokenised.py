"""Stores the tokenized rows of one source in memory-mapped files, for the cache and for worker processes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sft_jax.data.chat.encoder import Encoded, Tally
from sft_jax.data.read.rows import RowError
from sft_jax.errors import UserError
from sft_jax.files.digests import file_digest

_META = "meta.json"
_ARRAYS = {"ids": np.int32, "codes": np.uint8, "lengths": np.int32, "rows": np.int64, "targets": np.int32}
FILES = (*(f"{name}.bin" for name in _ARRAYS), _META)  # in a folder
_MAX_WEIGHTS = 256
_COPY_SIZE = 1 << 20  # ids that are copied at a time
_MAX_REASONS = 1000  # refused rows whose reason is stored; further ones are only counted


@dataclass(frozen=True)
class Tokenized:
    """Concatenated examples; example ``i`` has ``lengths[i]`` ids. A row gives one or several, a refused row none.

    Args:
        codes: index of the loss weight of each id in ``weights``: one byte instead of a float.
        targets: number of supervised tokens of each example, without its first token, which is never predicted.
        refused: the first refused rows and their reasons.
    """

    ids: np.ndarray
    codes: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    weights: np.ndarray  # float32
    num_rows: int
    num_refused: int
    refused: list[RowErrorAt]
    tally: Tally
    digest: str = ""  # hash of ids and weights


@dataclass(frozen=True)
class RowErrorAt:
    """A refused row, with its line in the file if it could not be parsed."""

    row: int
    reason: str
    line: int | None = None

    def at(self, name: str) -> str:
        """Same as :meth:`RowError.at`."""
        return RowError(self.reason, self.line).at(name, self.row)


_TALLIES = ("stops", "tokens", "targets", "notes", "unread")


@dataclass
class Writer:
    """Writes a :class:`Tokenized` to a folder, batch by batch."""

    folder: Path
    name: str  # name of the source, for error messages
    weights: list[float] = field(default_factory=lambda: [0.0, 1.0])
    num_rows: int = 0
    num_refused: int = 0
    refused: list[RowErrorAt] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self._files: dict[str, BinaryIO] = {name: (self.folder / f"{name}.bin").open("wb") for name in _ARRAYS}
        self._sizes = dict.fromkeys(_ARRAYS, 0)
        self._digests = {name: hashlib.blake2b(digest_size=16) for name in _ARRAYS}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, results: Sequence[list[Encoded] | RowError], first_row: int) -> None:
        """Add the results of encoding consecutive rows."""
        kept: list[Encoded] = []
        rows: list[int] = []
        for row, result in enumerate(results, first_row):
            if isinstance(result, RowError):
                self.num_refused += 1
                if len(self.refused) < _MAX_REASONS:  # of millions, few reasons are read
                    self.refused.append(RowErrorAt(row, str(result), result.line))
            else:
                kept += result
                rows += [row] * len(result)
        self.num_rows += len(results)
        if not kept:
            return
        lengths = np.asarray([len(one.ids) for one in kept], np.int32)
        masks = np.concatenate([one.mask for one in kept])
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        num_supervised = np.add.reduceat(masks > 0, starts, dtype=np.int32) - (masks[starts] > 0)
        self._write("ids", np.concatenate([one.ids for one in kept]))
        self._write("codes", self._codes(masks))
        self._write("lengths", lengths)
        self._write("rows", np.asarray(rows, np.int64))
        self._write("targets", num_supervised.astype(np.int32))

    def add_part(self, folder: Path) -> None:
        """Append the rows that another writer has written to ``folder``."""
        part = read_tokenized(folder)
        assert part is not None
        codes = self._codes(part.weights)
        for start in range(0, len(part.ids), _COPY_SIZE):  # not memory-mapped, since mapped pages would stay in memory
            self._write("ids", _read(folder, "ids", start))
            self._write("codes", codes[_read(folder, "codes", start)])
        self._write("lengths", part.lengths)
        self._write("rows", part.rows)
        self._write("targets", part.targets)
        self.refused += part.refused[: _MAX_REASONS - len(self.refused)]
        self.num_refused += part.num_refused
        self.num_rows += part.num_rows
        self.tally.add(part.tally)

    def finish(self) -> None:
        """Write the metadata, which makes the folder complete."""
        self.__exit__()
        tally = self.tally
        meta = {
            "sizes": self._sizes,
            "weights": self.weights,
            "digests": {name: digest.hexdigest() for name, digest in self._digests.items()},
            "num_rows": self.num_rows,
            "num_refused": self.num_refused,
            "refused": [[one.row, one.reason, one.line] for one in self.refused],
            "tally": {name: list(getattr(tally, name).items()) for name in _TALLIES},
        }
        (self.folder / _META).write_text(json.dumps(meta | {"digest": _digest_of(meta)}), encoding="utf-8")

    def _codes(self, weights: np.ndarray) -> np.ndarray:
        """Return the index of each weight in the table. Appends new weights in the order in which they first occur."""
        known = np.asarray(self.weights, np.float32)
        if ((weights == 0) | (weights == 1)).all():
            return weights.astype(np.uint8)
        unique, first = np.unique(weights, return_index=True)
        self.weights += [float(weight) for weight in unique[np.argsort(first)] if weight not in known]
        if len(self.weights) > _MAX_WEIGHTS:
            raise UserError(
                f"{self.name}: its rows have more than {_MAX_WEIGHTS - 2} different loss weights besides 0 and 1 "
                f"(the next one is {self.weights[-1]:.6g}); round them, for example to two digits"
            )
        known = np.asarray(self.weights, np.float32)
        order = np.argsort(known)
        return order[np.searchsorted(known[order], weights)].astype(np.uint8)

    def _write(self, name: str, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, _ARRAYS[name])
        self._files[name].write(values.data)
        self._digests[name].update(values.data)
        self._sizes[name] += len(values)


def _read(folder: Path, name: str, start: int) -> np.ndarray:
    dtype = np.dtype(_ARRAYS[name])
    return np.fromfile(folder / f"{name}.bin", dtype, _COPY_SIZE, offset=start * dtype.itemsize)


def _digest_of(meta: dict[str, Any]) -> str:
    """A digest of the metadata, which has the digests of the arrays."""
    return hashlib.blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_tokenized(folder: Path, verify: bool = False) -> Tokenized | None:
    """Read what a :class:`Writer` has written; None if the folder is incomplete.

    Args:
        verify: return None also if a digest is not that of what was written.
    """
    try:
        meta: dict[str, Any] = json.loads((folder / _META).read_text(encoding="utf-8"))
        digest = meta.pop("digest")
        if digest != _digest_of(meta):
            return None
        arrays = {}
        for name, dtype in _ARRAYS.items():
            path, size = folder / f"{name}.bin", meta["sizes"][name]
            if path.stat().st_size != size * np.dtype(dtype).itemsize:
                return None
            if verify and file_digest(path) != meta["digests"][name]:
                return None
            arrays[name] = np.memmap(path, dtype, "r", shape=(size,)) if size else np.zeros(0, dtype)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    tally = Tally(**{name: Counter(dict(map(tuple, pairs))) for name, pairs in meta["tally"].items()})
    return Tokenized(
        **arrays,
        weights=np.asarray(meta["weights"], np.float32),
        num_rows=meta["num_rows"],
        num_refused=meta["num_refused"],
        refused=[RowErrorAt(*one) for one in meta["refused"]],
        tally=tally,
        digest=f"{' '.join(meta['digests'].values())} {meta['weights']}",
    )
