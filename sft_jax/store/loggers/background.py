"""Runs the client of a service in a thread, so that neither a slow network nor a failure reaches the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from sft_jax.errors import one_line
from sft_jax.store.loggers.logger import Logger

_LONGEST_WAIT = 60.0  # seconds at the end, for what is not uploaded yet


class Background(Logger):
    """Passes everything to another logger, in order. If that fails, it says so once, and the logger stays off.

    Args:
        name: of the service, for messages.
        say: prints a line.
        wait: seconds that :meth:`close` waits at most.
    """

    def __init__(self, logger: Logger, name: str, say: Callable[[str], None], wait: float = _LONGEST_WAIT):
        self._logger, self._name, self._say, self._wait = logger, name, say, wait
        self._failed = False
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def hyperparameters(self, config: Mapping[str, Any]) -> None:
        """Pass the config."""
        self._tasks.put(partial(self._logger.hyperparameters, config))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Pass the numbers of a step."""
        self._tasks.put(partial(self._logger.scalars, step, values))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Pass generated answers."""
        self._tasks.put(partial(self._logger.samples, step, rows))

    def figure(self, step: int, name: str, path: Path) -> None:
        """Pass a PNG file."""
        self._tasks.put(partial(self._logger.figure, step, name, path))

    def close(self, failed: bool = False) -> None:
        """Wait until everything is passed, but not for ever."""
        self._tasks.put(partial(self._logger.close, failed))
        self._tasks.put(None)
        self._thread.join(self._wait)
        if self._thread.is_alive():
            self._failed = True
            self._say(f"{self._name}: still busy after {self._wait:g} s and left alone; metrics.jsonl is complete")

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._failed:
                continue
            try:
                task()
            except Exception as error:  # noqa: BLE001 - whatever a client raises, it must not end the run
                self._failed = True
                self._say(
                    f"{self._name}: {reason(error)}; it gets nothing more from this run, metrics.jsonl is complete"
                )


def reason(error: Exception) -> str:
    """An error of a client as one line without secrets."""
    return one_line(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
