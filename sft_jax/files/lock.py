"""Locks that end with their process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
from datetime import datetime
from pathlib import Path
from typing import Any


class FolderLock:
    """At most one process holds the lock of a folder, also on a file system that hosts share.

    The kernel releases it when the process ends, however it ends. The file says who holds or held it.

    Args:
        folder: has to exist before the lock is taken.
        name: name of the file in it.
    """

    NAME = ".lock"

    def __init__(self, folder: Path, name: str = NAME):
        self._path = folder / name
        self._file: Any = None

    def holder(self) -> str | None:
        """Returns who holds the lock; None if nobody does, or this object."""
        if self._file is not None or not self._path.is_file():
            return None
        with self._path.open("rb") as file:
            if not _lock(file, fcntl.LOCK_SH):
                return self._described(file.read())
        return None

    def take(self) -> str | None:
        """Takes the lock, and returns None; returns who holds it if somebody else does."""
        if self._file is not None:
            return None
        while True:
            file = open(self._path, "r+b", opener=_create)  # noqa: SIM115
            if not _lock(file, fcntl.LOCK_EX):
                with file:
                    return self._described(file.read())
            if self._is_in_place(file):
                break
            file.close()  # its holder removed it since it was opened
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

    def release(self, remove: bool = False) -> None:
        """Releases the lock, if this object holds it.

        Args:
            remove: whether to remove the file too.
        """
        if self._file is not None:
            if remove:
                self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _is_in_place(self, file: Any) -> bool:
        """Whether an open file is still the one that the path names."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    @staticmethod
    def _described(content: bytes) -> str:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            owner = json.loads(content)
            return f"process {owner['process']} on {owner['host']}, since {owner['since']}"
        return "another process"


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _lock(file: Any, kind: int) -> bool:
    """Lock a file; returns False if another process has it. On a file system without locks, says so."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        reason = f"its file system has no locks ({error.strerror}); only one process may write there"
        print(f"sft-jax: {file.name}: {reason}", file=sys.stderr, flush=True)
    return True
