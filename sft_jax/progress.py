"""Shows what long work does: a bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any

SECONDS = 10.0  # between two lines, and before the first
_is_silent = False


def silence() -> None:
    """Show nothing from now on: of several processes, one shows its progress."""
    global _is_silent
    _is_silent = True


class Work:
    """A context manager around long work. What ends within ten seconds prints no line.

    A thread prints, so lines also come while the work counts nothing, such as while a program is compiled:

    ``  loading  0.9 of 1.3 GB of weights, 20 s``

    Args:
        name: of the work, as at the start of the lines of a run.
        total: number of units; None if it is unknown.
        unit: in the plural; ``B`` for bytes, which are shown as kB, MB or GB.
        of: what the units are, such as ``weights``.
    """

    def __init__(self, name: str, total: int | None = None, unit: str = "", of: str = ""):
        self._name, self._total, self._unit, self._of = name, total, unit, of
        self._done = 0
        self._ended = threading.Event()
        self._bar: Any = None
        self._thread: threading.Thread | None = None
        self._since = time.monotonic()

    def __enter__(self) -> Work:
        self._since = time.monotonic()
        if _is_silent:
            return self
        if sys.stderr.isatty():
            from tqdm import tqdm

            unit = f" {self._unit}" if self._unit != "B" else "B"
            is_bytes = self._unit == "B"
            self._bar = tqdm(desc=self._name, total=self._total, unit=unit, unit_scale=is_bytes, leave=False)
        self._thread = threading.Thread(target=self._show, name=self._name, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def update(self, units: int = 1) -> None:
        """Count units that are done."""
        self._done += units
        if self._bar is not None:
            self._bar.update(units)

    def _show(self) -> None:
        while not self._ended.wait(1.0 if self._bar is not None else SECONDS):
            if self._bar is not None:
                self._bar.refresh()
            else:
                print(f"{self._name:>9}  {self._text()}", file=sys.stderr, flush=True)

    def _text(self) -> str:
        seconds = f"{time.monotonic() - self._since:.0f} s"
        if self._total is None and not self._done:
            return f"{self._of}, {seconds}" if self._of else seconds
        of = f" of {self._of}" if self._of else ""
        if self._unit == "B":
            size = self._total or self._done
            scale, unit = (1e9, "GB") if size >= 1e9 else (1e6, "MB") if size >= 1e6 else (1e3, "kB")
            total = "" if self._total is None else f" of {self._total / scale:.1f}"
            return f"{self._done / scale:.1f}{total} {unit}{of}, {seconds}"
        total = "" if self._total is None else f" of {self._total:,}"
        return f"{self._done:,}{total} {self._unit}{of}, {seconds}"
