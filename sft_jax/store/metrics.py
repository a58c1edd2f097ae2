"""What a run says while it runs: ``metrics.jsonl``, TensorBoard, Weights & Biases, and a progress bar."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from sft_jax.errors import UserError
from sft_jax.tree import flatten

_SECONDS_BETWEEN_LINES = 10.0


def check_wandb(project: str | None) -> None:
    """Refuse a project of Weights & Biases where its package is not installed.

    Raises:
        UserError: it is not.
    """
    if project is None:
        return
    try:
        import wandb  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise UserError("training.wandb_project: the package wandb is not installed (pip install wandb)") from error


class MetricsWriter:
    """Appends rows to ``metrics.jsonl`` and mirrors their numbers to TensorBoard and Weights & Biases.

    Args:
        folder: the run folder.
        keep_until: rows of later steps, left by a run that was cut off, are removed first.
        enabled: False on all processes but one.
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
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=keep_until + 1)
        if wandb_project:
            import wandb  # type: ignore[import-not-found]

            self._wandb = wandb.init(project=wandb_project, dir=str(folder), config=config, name=folder.name)

    def write(self, row: dict[str, Any]) -> None:
        """One row; a number that is not finite is written as null, which JSON can hold.

        Values may be numbers by name (losses by source), which become ``key/name`` in TensorBoard.
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
        """Answers written by the half-trained network: a row of their own, and text in TensorBoard.

        Args:
            samples: ``prompt``, ``text`` and ``finish_reason`` of each.
        """
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "samples": samples}, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for i, sample in enumerate(samples):
                text = f"{sample['prompt']}\n\n---\n\n{sample['text']}\n\n*{sample['finish_reason']}*"
                self._tensorboard.add_text(f"samples/{i}", text, step)

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
    """The rows of a ``metrics.jsonl``; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # whole lines end with a newline


class Progress:
    """A bar on a terminal, a line every few seconds elsewhere; loss, real tokens per second, time left."""

    def __init__(self, first_step: int, total_steps: int, enabled: bool = True):
        self._total = total_steps
        self._bar = None
        self._enabled = enabled
        self._last_line = -math.inf
        self._loss = math.nan
        self._start: tuple[float, int] | None = None  # when and at which step the first update came
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show a finished step."""
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
            began, first = self._start
            left = f"{_clock((now - began) / (step - first) * (self._total - step))} left" if step > first else ""
            self.say(f"step {step}/{self._total}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {left}")

    def say(self, text: str) -> None:
        """A line that does not disturb the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar where it is."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
