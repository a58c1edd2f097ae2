"""``metrics.jsonl``: a row per logged step, on the disk before a checkpoint is; other tools read it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_jax.files.flush import write_whole
from sft_jax.store.loggers.logger import Logger
from sft_jax.store.metrics import read_metrics


class Jsonl(Logger):
    """Appends rows to ``metrics.jsonl``.

    Args:
        folder: the run directory.
        keep_until: removes existing rows of later steps, which an interrupted run has left.
    """

    def __init__(self, folder: Path, keep_until: int):
        path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= keep_until]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a row; a value may be null, or a dict of numbers (losses by source)."""
        self._write(json.dumps({"step": step, **values}))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a row of generated answers."""
        self._write(json.dumps({"step": step, "samples": list(rows)}, ensure_ascii=False))

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Wait until the rows are on the disk."""
        os.fsync(self._file.fileno())

    def close(self, failed: bool = False) -> None:
        """Close the file."""
        self._file.close()
