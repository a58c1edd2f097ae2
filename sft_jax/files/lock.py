"""Locks that end with their process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import Any


class FolderLock:
    """At most one process holds the lock of a folder, also on a file system that hosts share.

    The kernel releases it when the process ends, however it ends. The file stays, and says who holds or held it.

    Args:
        folder: has to exist before the lock is taken.
    """

    NAME = ".lock"

    def __init__(self, folder: Path):
        self._path = folder / self.NAME
        self._file: Any = None

    def holder(self) -> str | None:
        """Returns who holds the lock; None if nobody does, or this object."""
        if self._file is not None or not self._path.is_file():
            return None
        with self._path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return self._described(file.read())
        return None

    def take(self) -> str | None:
        """Takes the lock, and returns None; returns who holds it if somebody else does."""
        if self._file is not None:
            return None
        file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with file:
                return self._described(file.read())
        owner = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().isoformat(" ", "seconds"),
        }
        file.truncate()
        file.write(json.dumps(owner).encode())
        file.flush()
        self._file = file
        return None

    def release(self) -> None:
        """Releases the lock, if this object holds it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @staticmethod
    def _described(content: bytes) -> str:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            owner = json.loads(content)
            return f"process {owner['process']} on {owner['host']}, since {owner['since']}"
        return "another process"
