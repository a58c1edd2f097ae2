"""One hostile folder: how it is made, which command reads it, and what the command has to say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Make = Callable[[Path], object]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A change of a good folder of a model or an adapter.

    Attributes:
        command: ``train``, ``generate``, ``check``, ``export`` (of a run whose base it is) or ``init`` (of an adapter).
        words: have to be in the one line of the refusal. None: the folder is read rightly. Empty: either.
    """

    name: str
    make: Make
    command: str = "train"
    words: tuple[str, ...] | None = ()


def text(name: str, content: str | bytes) -> Make:
    """Replaces a file."""

    def make(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def edit(name: str, change: Callable[[dict], Any]) -> Make:
    """Changes the JSON object in a file; ``change`` returns the new one."""

    def make(folder: Path) -> None:
        (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))

    return make


def keys(name: str, **values: Any) -> Make:
    """Sets keys of the JSON object in a file."""
    return edit(name, lambda old: old | values)


def no_torch() -> None:
    """Runs before each command: torch, which ``check`` compares with where it is installed, takes seconds to import."""
    import sys

    sys.modules["torch"] = None  # type: ignore[assignment]
