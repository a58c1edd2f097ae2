"""Stops a run whose held-out loss has stopped falling."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax

from sft_jax.distributed.processes import broadcast
from sft_jax.store.metrics import held_out_losses, read_metrics


class EarlyStopping:
    """Counts the evaluations since the lowest held-out loss.

    >>> rule = EarlyStopping(2, {0: 3.0, 10: 1.0, 20: 1.2})
    >>> rule.is_reached
    False
    >>> rule.measured(30, 1.1)
    >>> rule.is_reached, rule.reason
    (True, 'the held-out loss has not fallen below 1.0000 of step 10 in 2 evaluations')

    Args:
        patience: number of evaluations after which the run stops; None: it never stops.
        losses: held-out losses by step, of earlier starts of the run.
    """

    def __init__(self, patience: int | None, losses: Mapping[int, float]):
        self._patience = patience
        self._losses = dict(losses)

    def measured(self, step: int, loss: float) -> None:
        """Record the held-out loss of a step."""
        self._losses[step] = loss

    def loss(self, step: int) -> float | None:
        """The held-out loss of a step; None if it was not measured."""
        return self._losses.get(step)

    @property
    def best(self) -> int:
        """The step with the lowest held-out loss, the first of several."""
        return min(self._losses, key=lambda step: (self._losses[step], step))

    @property
    def is_reached(self) -> bool:
        """Whether the run has to stop."""
        if self._patience is None or not self._losses:
            return False
        return self._since_best >= self._patience

    @property
    def reason(self) -> str:
        """Why the run stops."""
        best = self.best
        return (
            f"the held-out loss has not fallen below {self._losses[best]:.4f} of step {best} in {self._since_best} "
            "evaluations"
        )

    @property
    def _since_best(self) -> int:
        best = self.best
        return sum(step > best for step in self._losses)


def early_stopping(patience: int | None, run: Path, latest: int | None) -> EarlyStopping:
    """The rule with the held-out losses of earlier starts, as process 0 sees them.

    Args:
        run: the run directory.
        latest: the step that the run resumes from; None for a new run.
    """
    losses: dict[int, float] = {}
    if patience is not None and latest is not None:
        if jax.process_index() == 0:
            earlier = held_out_losses(read_metrics(run / "metrics.jsonl"))
            losses = {step: loss for step, loss in earlier.items() if step <= latest}
        answer = json.loads(broadcast("held-out losses", json.dumps(losses)))
        losses = {int(step): loss for step, loss in answer.items()}
    return EarlyStopping(patience, losses)
