"""Writes that survive a power cut: what has its name is on the disk with all of its content."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """Wait until everything in a folder is on the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            flush(Path(root, name))
        flush(Path(root))


def write_whole(path: Path, text: str) -> None:
    """Write a text file such that it has either its old or its new content, whenever the process or the power ends."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    flush(path.parent)
