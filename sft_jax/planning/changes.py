"""Changes to a config, as they are written on the command line."""

from __future__ import annotations

import dataclasses
from typing import Any

from sft_jax.config import Config

Changes = dict[str, Any]
"""Dotted keys of two parts, such as ``model.remat``, and their new values."""


def changed(config: Config, changes: Changes) -> Config:
    """The config with other values, checked as when it is read.

    Raises:
        UserError: values that do not go together.
    """
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    new = {section: dataclasses.replace(getattr(config, section), **values) for section, values in sections.items()}
    return dataclasses.replace(config, **new)


def as_text(changes: Changes) -> str:
    """What to add to the command.

    >>> as_text({"model.remat": "full", "mesh.tensor": 2})
    'model.remat=full mesh.tensor=2'
    """
    return " ".join(f"{key}={value}" for key, value in changes.items())
