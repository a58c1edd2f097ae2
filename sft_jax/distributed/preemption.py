"""Detects preemption, and agrees on the step at which all processes stop."""

from __future__ import annotations

import http.client
import os
import signal
import threading
import urllib.request
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

_NOTICES = {  # keys of Google's metadata server, with their values while nothing is announced
    "maintenance-event": ("NONE", "MIGRATE_ON_HOST_MAINTENANCE"),
    "preempted": ("FALSE",),
}
_POLL_SECONDS = 5.0
_TIMEOUT_SECONDS = 10.0


class Preemption:
    """While the ``with`` block runs, SIGTERM stops the run after the current step; a second SIGTERM kills it.

    All processes stop at the same step, whichever of them received the signal: jax's preemption service coordinates
    them. A run of one process also stops during an evaluation, which the resumed run repeats. On Cloud TPU, a
    maintenance or preemption notice has the same effect as SIGTERM.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: Any = None
        self._stop_watching = threading.Event()

    def __enter__(self) -> Preemption:
        # With several processes, jax's preemption service handles the signal, and a handler here would replace it.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        if jax.default_backend() == "tpu":
            host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
            threading.Thread(target=watch_notices, args=(host, self._stop_watching), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_watching.set()
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Whether to stop after ``step``. All processes must call this after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    @property
    def requested(self) -> bool:
        """Whether the only process of a run was asked to stop; several processes agree in :meth:`reached` only."""
        return self._requested and jax.process_count() == 1

    def request(self) -> None:
        """Ask the run to stop, as SIGTERM does."""
        if jax.process_count() > 1:  # jax's preemption service notifies the other processes
            os.kill(os.getpid(), signal.SIGTERM)
        self._requested = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        signal.signal(number, signal.SIG_DFL)


def watch_notices(host: str, stop: threading.Event, every: float = _POLL_SECONDS) -> None:
    """Poll Google's metadata server until ``stop`` is set; sends SIGTERM to this process at the first notice.

    Args:
        host: host of the metadata server, with a port if it is not 80.
        every: seconds between polls.
    """
    while not stop.wait(every):
        for name, no_notice in _NOTICES.items():
            request = urllib.request.Request(
                f"http://{host}/computeMetadata/v1/instance/{name}", headers={"Metadata-Flavor": "Google"}
            )
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
                    notice = response.read().decode().strip()
            except (OSError, http.client.HTTPException):
                continue  # this machine has no such notice; SIGTERM still works
            if notice and notice not in no_notice:
                os.kill(os.getpid(), signal.SIGTERM)
                return
