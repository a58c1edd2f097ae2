"""Where a run resumes. With several processes, process 0 decides."""

from __future__ import annotations

import dataclasses
from datetime import date
from pathlib import Path
from typing import Any

import jax

from sft_jax import config_file as configs
from sft_jax.config import Config
from sft_jax.data.chat.template import ChatTemplates
from sft_jax.distributed.processes import LONG_WAIT_SECONDS, of_first
from sft_jax.store.checkpoint import latest_step
from sft_jax.store.folder import RunFolder
from sft_jax.store.metrics import read_metrics


def last_step(folder: RunFolder) -> int | None:
    """The step to resume from, as process 0 sees it; another process may see the directory change while it looks."""
    here = latest_step(folder.checkpoints) if jax.process_index() == 0 else None
    said = of_first("the last step", "" if here is None else str(here))
    return int(said) if said else None


def dated(config: Config, tokenizer: Any, run: Path, latest: int | None) -> Config:
    """The config with the date that ``strftime_now`` of its template prints: the run's first day, by process 0's clock.

    Without it, a run that resumes on another day, or a host past midnight, would render other rows.
    """
    templates = ChatTemplates.of(tokenizer)
    if config.data.date is not None or templates is None or not templates.tells_the_day:
        return config
    day = None
    if jax.process_index() == 0:
        day = date.today().isoformat() if latest is None else configs.load(run / "config.yaml").data.date
    day = of_first("the date", day or "", LONG_WAIT_SECONDS) or None  # the model may still be downloading elsewhere
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=day))


def is_due(run: Path, latest: int | None, every: int, key: str) -> bool:
    """Whether the metrics of the step that a run resumes from lack a key that they should have.

    Process 0 decides: other processes may see an older or newer copy of the directory.
    """
    if latest is None:
        return True
    due = latest % every == 0 and not any(
        row["step"] == latest and key in row for row in read_metrics(run / "metrics.jsonl")
    )
    return of_first(f"metrics missing at step {latest}", "yes" if due else "no") == "yes"
