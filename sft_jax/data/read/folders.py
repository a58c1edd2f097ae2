"""Temporary directories of this process, and the cache directory of the user."""

from __future__ import annotations

import atexit
import os
import tempfile
from pathlib import Path

from sft_jax.files.lock import FolderLock
from sft_jax.files.temporary import remove_temporary, temporary_folder

_root: list[tuple[Path, FolderLock]] = []


def scratch_folder() -> Path:
    """Create a temporary directory; it is deleted when the process exits, or by a later one if this one is killed."""
    if not _root:
        _root.append(temporary_folder(Path(tempfile.gettempdir()), "sft-jax-rows-"))
        atexit.register(remove_temporary, *_root[0])
    return Path(tempfile.mkdtemp(dir=_root[0][0]))


def cache_folder() -> Path:
    """Return ``$SFT_JAX_CACHE``, or ``sft-jax`` in the user's cache directory."""
    folder = os.environ.get("SFT_JAX_CACHE")
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sft-jax"
