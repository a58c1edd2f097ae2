"""Alarms: metrics of a step that mean that a run does not learn what it should."""

from __future__ import annotations

from typing import Any

_STILL_STEPS = 5  # steps in a row without a gradient


class Alarms:
    """Finds alarms in the metrics of one step after another; each is raised when it begins, not at every step."""

    def __init__(self) -> None:
        self._still = self._empty = 0

    def of(self, row: dict[str, Any], is_spike: bool = False) -> list[str]:
        """The alarms of a step.

        Args:
            row: its metrics, as in ``metrics.jsonl``.
            is_spike: whether its update was left out.
        """
        alarms = []
        if is_spike:
            alarms.append(
                f"spike: gradient norm {row['grad_norm']:.4g}; the update is left out ({row['skipped_steps']} so far)"
            )
        self._empty = self._empty + 1 if row["target_tokens"] == 0 else 0
        if self._empty == 1:
            alarms.append("alarm: the batch has no supervised token, so nothing is learned from it")
        learns_nothing = row["grad_norm"] == 0 and row["target_tokens"] > 0
        self._still = self._still + 1 if learns_nothing else 0
        if self._still == _STILL_STEPS:
            alarms.append(f"alarm: all gradients were 0 in the last {_STILL_STEPS} steps, so nothing is learned")
        return alarms
