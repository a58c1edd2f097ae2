"""Families of models: a file each, named as the ``model_type`` of ``config.json``. README.md: how to add one."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from sft_jax.errors import UserError
from sft_jax.models.architecture import Architecture


@cache
def families() -> dict[str, Any]:
    """Every family's file, a module with ``read(config)``, by its name."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "read")}


def read_family(config: Any) -> Architecture:
    """The architecture that a config of transformers describes.

    Raises:
        UserError: a family, or a setting of one, that is not supported.
    """
    return families()[config.model_type].read(config)


def check_family(name: object) -> None:
    """Refuse a ``model_type`` that no file is named by.

    Raises:
        UserError: with those that are there.
    """
    if name not in families():
        raise UserError(f"model family {name!r} is not supported; supported are {', '.join(families())}")
