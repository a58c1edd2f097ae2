"""Notice that the machine is about to be taken away, and the step at which all processes stop for it."""

from __future__ import annotations

import os
import signal
import threading
import urllib.error
import urllib.request
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

_NOTICES = {  # of Google's metadata server, with what they say while nothing is announced
    "maintenance-event": ("NONE", "MIGRATE_ON_HOST_MAINTENANCE"),
    "preempted": ("FALSE",),
}
_POLL_SECONDS = 5.0


class Preemption:
    """SIGTERM, while the ``with`` block runs, asks the run to stop at the next step; a second one ends it at once.

    Several processes stop at the same step, whichever of them was asked: jax's preemption service agrees on it. On
    Cloud TPU the notice of a maintenance or a preemption is taken for a SIGTERM.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: Any = None
        self._over = threading.Event()

    def __enter__(self) -> Preemption:
        # With several processes the signal belongs to jax's service; a handler of ours would take it away.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        if jax.default_backend() == "tpu":
            host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
            threading.Thread(target=watch_notices, args=(host, self._over), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Whether to stop after ``step``. With several processes, each asks after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def ask(self) -> None:
        """Ask the run to stop, as the machine would."""
        if jax.process_count() > 1:  # jax's service tells the others
            os.kill(os.getpid(), signal.SIGTERM)
        self._asked = True

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)


def watch_notices(host: str, over: threading.Event, every: float = _POLL_SECONDS) -> None:
    """Ask Google's metadata server for notices until ``over``; send this process SIGTERM at the first.

    Args:
        host: of the metadata server, with a port where it is not 80.
        every: seconds.
    """
    while not over.wait(every):
        for name, nothing in _NOTICES.items():
            request = urllib.request.Request(
                f"http://{host}/computeMetadata/v1/instance/{name}", headers={"Metadata-Flavor": "Google"}
            )
            try:
                with urllib.request.urlopen(request, timeout=every) as answer:
                    said = answer.read().decode().strip()
            except (urllib.error.URLError, OSError):
                continue  # no such notice here; SIGTERM still comes
            if said and said not in nothing:
                os.kill(os.getpid(), signal.SIGTERM)
                return
