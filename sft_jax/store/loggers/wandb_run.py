"""Weights & Biases: https://docs.wandb.ai. Its own settings apply, such as ``WANDB_MODE=offline``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_jax.errors import UserError
from sft_jax.store.loggers.identities import known_as, remember
from sft_jax.store.loggers.logger import LoggedRun, Logger


def check_login() -> None:
    """Check that there is a login, unless W&B is offline: without one, it would ask in the middle of the start.

    Raises:
        UserError: there is none.
    """
    import wandb  # type: ignore[import-not-found]
    from wandb.errors import CommError  # type: ignore[import-not-found]

    if wandb.setup().settings.mode != "online":
        return
    try:
        logged_in = wandb.login(prompt=False)
    except CommError:  # not reachable now; opening says so
        return
    if not logged_in:
        raise UserError("training.wandb_project: no login; run `wandb login`, or set WANDB_MODE=offline")


class Wandb(Logger):
    """Logs to a run of W&B; a resumed run continues it. The step is a metric of its own.

    W&B drops what is logged for a step before its newest one, which a resumed run would lose; over a step metric, steps
    may repeat.
    """

    def __init__(self, run: LoggedRun, project: str):
        import wandb  # type: ignore[import-not-found]

        self._wandb = wandb
        identity = known_as(run, "wandb", project)
        self._run = wandb.init(
            project=project,
            name=run.name,
            dir=str(run.folder),
            config=dict(run.config),
            id=identity,
            resume="allow" if identity else None,
        )
        remember(run, "wandb", project, self._run.id)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the numbers of a step."""
        self._run.log({"step": step, **values})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log generated answers as a table."""
        columns: list[Any] = ["step", "prompt", "text", "finish_reason"]
        data: Any = [[step, row["prompt"], row["text"], row["finish_reason"]] for row in rows]
        self._run.log({"step": step, "samples": self._wandb.Table(columns=columns, data=data)})

    def figure(self, step: int, name: str, path: Path) -> None:
        """Log a PNG file as an image."""
        self._run.log({"step": step, name: self._wandb.Image(str(path))})

    def close(self, failed: bool = False) -> None:
        """Wait for the upload, and mark the run as finished or failed."""
        self._run.finish(exit_code=int(failed))
