"""What every logger does, and what it knows about the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LoggedRun:
    """The run that a logger writes about.

    Attributes:
        folder: the run directory; for one in a bucket, the local folder that is uploaded.
        name: the name that a person sees.
        config: the config as nested dicts, without secrets.
        first_step: the step that the run resumes from; None for a new run.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    first_step: int | None = None

    @property
    def is_resumed(self) -> bool:
        """Whether the run resumes from a checkpoint, so that a service continues its run too."""
        return self.first_step is not None


class Logger:
    """A place that metrics are written to. What a place has no use for does nothing."""

    def hyperparameters(self, config: Mapping[str, Any]) -> None:
        """Write the config, as nested dicts without secrets."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers of a step, by tag."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write generated answers: ``prompt``, ``text`` and ``finish_reason``."""

    def figure(self, step: int, name: str, path: Path) -> None:
        """Write a PNG file."""

    def close(self, failed: bool = False) -> None:
        """Wait until everything is written, and close.

        Args:
            failed: whether the run ended with an error, or was stopped.
        """
