"""TensorBoard event files in ``tensorboard/`` of the run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_jax.store.loggers.logger import LoggedRun, Logger


class TensorBoard(Logger):
    """Writes event files. A resumed run hides the events of later steps, which an interrupted run has left."""

    def __init__(self, run: LoggedRun):
        from tensorboardX import SummaryWriter

        purge = 0 if run.first_step is None else run.first_step + 1
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)

    def hyperparameters(self, config: Mapping[str, Any]) -> None:
        """Write the config as text, which TensorBoard renders as Markdown."""
        lines = json.dumps(config, indent=2, ensure_ascii=False).splitlines()
        self._writer.add_text("config", "\n".join(f"    {line}" for line in lines), 0)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers of a step."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write generated answers as text."""
        for i, row in enumerate(rows):
            text = f"{row['prompt']}\n\n---\n\n{row['text']}\n\n*{row['finish_reason']}*"
            self._writer.add_text(f"samples/{i}", text, step)

    def figure(self, step: int, name: str, path: Path) -> None:
        """Write a PNG file as an image."""
        from matplotlib import image

        self._writer.add_image(name, image.imread(path)[..., :3], step, dataformats="HWC")

    def close(self, failed: bool = False) -> None:
        """Write what is buffered."""
        self._writer.close()
