"""Temporary folders that are removed by a later process if theirs was killed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from pathlib import Path

from sft_jax.files.lock import FolderLock

_STALE_SECONDS = 24 * 3600  # after which a folder without a lock is nobody's


def temporary_folder(parent: Path, prefix: str) -> tuple[Path, FolderLock]:
    """Create a temporary folder, and remove those of processes that have ended.

    Args:
        parent: its parent folder.
        prefix: of its name; no other folders may begin with it.

    Returns:
        The folder, and its lock, which the caller has to keep as long as it needs the folder.
    """
    _remove_dead(parent, prefix)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = FolderLock(folder)
        with contextlib.suppress(FileNotFoundError):
            if lock.take() is None:
                return folder, lock
        # Another process found the folder before it was locked, and removes it.


def remove_temporary(folder: Path, lock: FolderLock) -> None:
    """Remove what :func:`temporary_folder` has created."""
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()


def _remove_dead(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # it is another user's, or another process removes it
            lock = FolderLock(folder)
            if (folder / FolderLock.NAME).is_file():
                if lock.take() is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    lock.release()
            elif time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder)
