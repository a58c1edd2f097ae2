"""Reads the metrics of a run, and shows its progress."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SECONDS_BETWEEN_LINES = 10.0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a ``metrics.jsonl``.

    An incomplete last line, which a killed run may leave, is skipped; so are damaged lines, which are named on stderr.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # complete lines end with a newline
    rows, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            damaged.append(number)
    if damaged:
        print(f"sft-jax: {path}: damaged line(s) left out: {', '.join(map(str, damaged[:10]))}", file=sys.stderr)
    return rows


def held_out_losses(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """The held-out losses in the rows of a ``metrics.jsonl``, by step."""
    return {row["step"]: row["eval_loss"] for row in rows if row.get("eval_loss") is not None}


class Progress:
    """Shows loss, real tokens per second and time left: a bar on a terminal, otherwise a line every few seconds."""

    def __init__(self, first_step: int, total_steps: int, enabled: bool = True):
        self._total = total_steps
        self._bar = None
        self._enabled = enabled
        self._last_line = -math.inf
        self._loss = math.nan
        self._start: tuple[float, int] | None = None  # time and step of the first update
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show a completed step."""
        if not self._enabled:
            return
        smoothed = loss if math.isnan(self._loss) else 0.9 * self._loss + 0.1 * loss
        self._loss = smoothed
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {smoothed:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        self._start = self._start or (now, step)
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._total:
            self._last_line = now
            started, first = self._start
            left = f"{_duration((now - started) / (step - first) * (self._total - step))} left" if step > first else ""
            self.say(f"step {step}/{self._total}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {left}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the bar and leave it on the screen."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
