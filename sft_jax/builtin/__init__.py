"""Locates the built-in tiny pretrained model and the data sets about its world."""

from __future__ import annotations

from pathlib import Path

from sft_jax.errors import UserError

PREFIX = "builtin:"
_FOLDER = Path(__file__).parent


def locate(name: str, asked_by: str) -> Path:
    """Returns the path of a name such as ``builtin:tiny`` or ``builtin:countries/train.jsonl``.

    Args:
        asked_by: the config key or file with the name, for the error message.

    Raises:
        UserError: unknown name; the message lists the known ones.
    """
    known = {"tiny": _FOLDER / "tiny"}
    known |= {f"countries/{file.name}": file for file in sorted((_FOLDER / "countries").glob("*.jsonl"))}
    path = known.get(name.removeprefix(PREFIX))
    if path is None:
        raise UserError(f"{asked_by}: {name!r} is not built in; there are {', '.join(PREFIX + key for key in known)}")
    return path
