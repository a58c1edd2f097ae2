"""Decides where a run resumes. With several processes, process 0 decides."""

from __future__ import annotations

import dataclasses
from datetime import date
from pathlib import Path
from typing import Any

import jax

from sft_jax import config_file as configs
from sft_jax.config import Config
from sft_jax.data.chat.template import ChatTemplates
from sft_jax.distributed.processes import LONG_WAIT_SECONDS, broadcast
from sft_jax.errors import UserError
from sft_jax.files.buckets import failures
from sft_jax.run.announce import Announcer
from sft_jax.store.checkpoint import DamagedError, latest_step
from sft_jax.store.folder import RunDirectory
from sft_jax.store.metrics import read_metrics


def last_step(folder: RunDirectory) -> int | None:
    """The step to resume from, as process 0 sees it: the directory may change between the reads of two processes."""
    step = latest_step(folder.checkpoints) if jax.process_index() == 0 else None
    answer = broadcast("the last step", "" if step is None else str(step))
    return int(answer) if answer else None


def set_aside(folder: RunDirectory, error: DamagedError, say: Announcer) -> int | None:
    """Move a damaged checkpoint out of the way; returns the step to resume from instead, None to begin anew.

    Raises:
        UserError: it cannot be moved.
    """
    if jax.process_index() == 0:
        target = folder.checkpoints.parent / "damaged" / str(error.step)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rmtree()
            (folder.checkpoints / str(error.step)).rename(target)
        except failures() as problem:
            raise UserError(f"{folder}: {error}; move it away and run the same command again") from problem
    step = last_step(folder)
    way_on = "begins anew" if step is None else f"resumes at step {step}"
    say("damage", f"{error}; it is now in {folder}/damaged/{error.step}, and the run {way_on}")
    return step


def with_date(config: Config, tokenizer: Any, run: Path, latest: int | None) -> Config:
    """Set the date used by ``strftime_now`` in templates to the first day of the run, by the clock of process 0.

    Otherwise, a run that resumes on another day, or a host past midnight, would render other text.
    """
    templates = ChatTemplates.of(tokenizer)
    if config.data.date is not None or templates is None or not templates.uses_date:
        return config
    used = None
    if jax.process_index() == 0:
        used = date.today().isoformat() if latest is None else configs.load(run / "config.yaml").data.date
    used = broadcast("the date", used or "", LONG_WAIT_SECONDS) or None  # other hosts may still download the model
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=used))


def is_due(run: Path, latest: int | None, every: int, key: str) -> bool:
    """Whether metrics that were due at the step that a run resumes from are missing; True for a new run.

    Process 0 decides: other processes may see an older or newer copy of the directory.

    Args:
        every: number of steps between these metrics.
        key: a key of these metrics.
    """
    if latest is None:
        return True
    due = latest % every == 0 and not any(
        row["step"] == latest and key in row for row in read_metrics(run / "metrics.jsonl")
    )
    return broadcast(f"metrics missing at step {latest}", "yes" if due else "no") == "yes"
