"""Ends a process with the process that started it."""

from __future__ import annotations

import os
import threading
import time

_SECONDS = 0.2  # between two looks


def end_with_parent() -> None:
    """End this process soon after its parent has ended, however that ended.

    A thread watches, because the signal that Linux offers for this comes already when the parent's thread ends.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
