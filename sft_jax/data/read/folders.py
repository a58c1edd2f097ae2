"""Temporary directories of this process, and the cache directory of the user."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_root: list[tempfile.TemporaryDirectory] = []


def scratch_folder() -> Path:
    """Create a temporary directory, which is deleted when the process exits."""
    if not _root:
        _root.append(tempfile.TemporaryDirectory(prefix="sft-jax-"))
    return Path(tempfile.mkdtemp(dir=_root[0].name))


def cache_folder() -> Path:
    """Return ``$SFT_JAX_CACHE``, or ``sft-jax`` in the user's cache directory."""
    folder = os.environ.get("SFT_JAX_CACHE")
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sft-jax"
