"""Chooses a checkpoint of a run: a step, the last, or the one with the lowest held-out loss."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sft_jax.errors import UserError
from sft_jax.store.metrics import held_out_losses

Step = int | str | None
"""The number of a step, ``last`` (also None), or ``best``."""


def choose_step(run: object, step: Step, steps: Sequence[int], metrics: Sequence[Mapping[str, Any]]) -> int:
    """Returns the step of the checkpoint to use; prints the loss of the best, and whether an unsaved step had a lower.

    Args:
        run: the name of the run, for messages.
        steps: steps with a checkpoint, at least one, oldest first.
        metrics: the rows of ``metrics.jsonl``.

    Raises:
        UserError: there is no such checkpoint, or ``best`` without held-out losses.
    """
    if step is None or step == "last":
        return steps[-1]
    there_are = f"there are {', '.join(map(str, steps))}"
    if isinstance(step, int):
        if step not in steps:
            raise UserError(f"{run}: has no checkpoint of step {step}; {there_are}")
        return step
    if step != "best":
        raise UserError(f"{run}: {step!r} is neither a step nor best or last; {there_are}")
    losses = held_out_losses(metrics)
    saved = {one: losses[one] for one in steps if one in losses}
    if not saved:
        raise UserError(f"{run}: no checkpoint has a held-out loss to choose the best by; {there_are}")
    best, lowest = min(saved, key=lambda one: saved[one]), min(losses, key=lambda one: losses[one])
    text = f"the best checkpoint is step {best}, held-out loss {saved[best]:.4f}"
    if losses[lowest] < saved[best]:
        text += f"; step {lowest} had {losses[lowest]:.4f} and was not saved (training.keep_best keeps the best)"
    print(f"{run}: {text}", file=sys.stderr, flush=True)
    return best
