"""Config changes in the form of command-line overrides."""

from __future__ import annotations

import dataclasses
from typing import Any

from sft_jax.config import Config

Changes = dict[str, Any]
"""Maps a dotted key such as ``model.remat`` to its new value."""


def changed(config: Config, changes: Changes) -> Config:
    """Returns the config with new values and validates it like a config file.

    Raises:
        UserError: the values contradict each other.
    """
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    new = {section: dataclasses.replace(getattr(config, section), **values) for section, values in sections.items()}
    return dataclasses.replace(config, **new)


def as_text(changes: Changes) -> str:
    """Formats changes as command-line overrides.

    >>> as_text({"model.remat": "full", "mesh.tensor": 2})
    'model.remat=full mesh.tensor=2'
    """
    return " ".join(f"{key}={value}" for key, value in changes.items())
