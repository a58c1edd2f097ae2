"""Temporary folders of this process, gone when it ends."""

from __future__ import annotations

import tempfile
from pathlib import Path

_root: list[tempfile.TemporaryDirectory] = []


def scratch_folder() -> Path:
    """A new, empty folder."""
    if not _root:
        _root.append(tempfile.TemporaryDirectory(prefix="sft-jax-"))
    return Path(tempfile.mkdtemp(dir=_root[0].name))
