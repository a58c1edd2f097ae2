"""Model families, one file per ``model_type`` of ``config.json``. README.md describes how to add one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

from sft_jax.errors import UserError
from sft_jax.models.architecture import Architecture
from sft_jax.models.families.values import check_architecture


@cache
def families() -> dict[str, Any]:
    """Returns the module of every family, with its function ``read(config)``, by name."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "read")}


def read_family(config: Any) -> Architecture:
    """Returns the architecture of a transformers config.

    Raises:
        UserError: the family, or a setting of it, is not supported, or a value is of a wrong type or out of bounds.
    """
    arch = families()[config.model_type].read(config)
    check_architecture(arch)
    return arch


def as_in_files(arch: Architecture, shape: Callable[[str], tuple[int, ...] | None]) -> Architecture:
    """Returns the architecture with the layout of its files, in a family that has several.

    Args:
        shape: the shape of a tensor in the files by its name; None if it is not there.
    """
    change = getattr(families()[arch.family], "as_in_files", None)
    return arch if change is None else change(arch, shape)


def check_family(name: object) -> None:
    """Checks that a ``model_type`` is supported.

    Raises:
        UserError: it is not; the message names the supported families.
    """
    if not isinstance(name, str) or name not in families():
        raise UserError(f"model family {name!r} is not supported; supported are {', '.join(families())}")
