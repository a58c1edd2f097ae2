"""Writes the metrics of a run to all of its loggers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_jax.redaction import values_without_secrets
from sft_jax.store.loggers.jsonl import Jsonl
from sft_jax.store.loggers.logger import Logger
from sft_jax.store.loggers.tags import tagged


class MetricsWriter:
    """Appends rows to ``metrics.jsonl``, and passes their numbers to the other loggers.

    Args:
        rows: writes ``metrics.jsonl``; None on all processes except one, which write nothing.
    """

    def __init__(self, rows: Jsonl | None, loggers: Sequence[Logger] = ()):
        self._rows, self._loggers = rows, loggers

    def write(self, row: dict[str, Any]) -> None:
        """Write one row. Numbers that are not finite become null, because JSON cannot represent them.

        A value may be a dict of numbers (losses by source).
        """
        if self._rows is None:
            return
        finite = {
            key: {name: _finite(one) for name, one in value.items()} if isinstance(value, dict) else _finite(value)
            for key, value in row.items()
            if key != "step"
        }
        self._rows.scalars(row["step"], finite)
        values = tagged(finite)
        for logger in self._loggers:
            logger.scalars(row["step"], values)

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Write generated answers as a separate row.

        Args:
            samples: dicts with ``prompt``, ``text`` and ``finish_reason``.
        """
        if self._rows is None:
            return
        self._rows.samples(step, samples)
        public = values_without_secrets(samples)
        for logger in self._loggers:
            logger.samples(step, public)

    def write_results(self, step: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Pass the metrics of whole models, by the model's name; ``report/summary.json`` has them already."""
        values = {
            f"final/{name}/{key}": value
            for name, metrics in results.items()
            for key, value in metrics.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        for logger in self._loggers:
            logger.scalars(step, values)

    def write_figure(self, step: int, path: Path) -> None:
        """Pass a PNG file."""
        for logger in self._loggers:
            logger.figure(step, path.stem, path)

    def flush(self) -> None:
        """Wait until the rows are on the disk."""
        if self._rows is not None:
            self._rows.flush()

    def close(self, failed: bool = False) -> None:
        """Flush and close everything."""
        if self._rows is not None:
            self._rows.close()
        for logger in self._loggers:
            logger.close(failed)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
