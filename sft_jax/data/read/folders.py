"""Folders of our own: temporary ones of this process, and the cache of the user."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_root: list[tempfile.TemporaryDirectory] = []


def scratch_folder() -> Path:
    """A new, empty folder, gone when the process ends."""
    if not _root:
        _root.append(tempfile.TemporaryDirectory(prefix="sft-jax-"))
    return Path(tempfile.mkdtemp(dir=_root[0].name))


def cache_folder() -> Path:
    """``$SFT_JAX_CACHE``, or ``sft-jax`` in the user's cache folder."""
    given = os.environ.get("SFT_JAX_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sft-jax"
