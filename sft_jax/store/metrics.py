"""Writes the metrics of a run: ``metrics.jsonl``, TensorBoard, Weights & Biases, and a progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from sft_jax.errors import UserError
from sft_jax.files.flush import write_whole
from sft_jax.tree import flatten

_SECONDS_BETWEEN_LINES = 10.0


def check_wandb(project: str | None) -> None:
    """Check that the package of Weights & Biases is installed if ``project`` is set.

    Raises:
        UserError: it is not installed.
    """
    if project is None:
        return
    try:
        import wandb  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise UserError("training.wandb_project: the package wandb is not installed (pip install wandb)") from error


class MetricsWriter:
    """Appends rows to ``metrics.jsonl`` and logs their numbers to TensorBoard and Weights & Biases.

    Args:
        folder: the run directory.
        keep_until: removes existing rows of later steps, which an interrupted run has left.
        enabled: False on all processes except one.
    """

    def __init__(
        self,
        folder: Path,
        keep_until: int,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
        enabled: bool = True,
    ):
        self._file = self._tensorboard = self._wandb = None
        if not enabled:
            return
        path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= keep_until]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=keep_until + 1)
        if wandb_project:
            import wandb  # type: ignore[import-not-found]

            self._wandb = wandb.init(project=wandb_project, dir=str(folder), config=config, name=folder.name)

    def write(self, row: dict[str, Any]) -> None:
        """Write one row. Numbers that are not finite become null, because JSON cannot represent them.

        A value may be a dict of numbers (losses by source), which become ``key/name`` in TensorBoard.
        """
        if self._file is None:
            return
        finite = {
            key: {name: _finite(one) for name, one in value.items()} if isinstance(value, dict) else _finite(value)
            for key, value in row.items()
        }
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        flat = {"/".join(path): value for path, value in flatten(finite).items()}
        numbers = {key: value for key, value in flat.items() if key != "step" and value is not None}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Write generated answers as a separate row, and as text in TensorBoard.

        Args:
            samples: dicts with ``prompt``, ``text`` and ``finish_reason``.
        """
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "samples": samples}, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for i, sample in enumerate(samples):
                text = f"{sample['prompt']}\n\n---\n\n{sample['text']}\n\n*{sample['finish_reason']}*"
                self._tensorboard.add_text(f"samples/{i}", text, step)

    def flush(self) -> None:
        """Wait until the rows are on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close everything."""
        for sink in (self._file, self._tensorboard):
            if sink is not None:
                sink.close()
        if self._wandb is not None:
            self._wandb.finish()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
