"""Whether a case can run, before it does: what the config refuses, and the memory that it needs at least."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmark.kit import model_config
from benchmark.runners import config_of


def refusal_of(shape: str, options: dict[str, Any], usable: int) -> str | None:
    """Why a case cannot run on a device with ``usable`` bytes; None if it may."""
    from sft_jax.errors import UserError

    reason = unavailable(options)
    if reason is not None:
        return f"not available: {reason}"
    try:
        reason = too_large(least_bytes(shape, options), usable)
    except UserError as error:  # what only the network refuses
        return f"not available: {error}"
    return None if reason is None else f"skipped: {reason}"


def unavailable(options: dict[str, Any]) -> str | None:
    """Why this version refuses the options of a case; None if it does not."""
    from sft_jax.config import ModelConfig
    from sft_jax.errors import UserError

    if options["compute"] and "compute" not in {field.name for field in dataclasses.fields(ModelConfig)}:
        return f"this version has no model.compute={options['compute']}"
    try:
        config_of(options, "none")
    except UserError as error:
        return str(error)
    return None


def least_bytes(shape: str, options: dict[str, Any]) -> int:
    """The bytes that a step needs at least, as in ``plan``, before it is compiled.

    Weights, optimizer state, batch and gradients, and the inputs of all layers, which full rematerialization saves.
    TRL with the same dtypes needs no less.
    """
    import jax

    from sft_jax.planning.step import abstract_step, read_base

    jax.config.update("jax_platforms", "cpu")
    config = config_of(options | {"remat": "full", "attention": "xla"}, "none")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model_config(shape, options["dtype"])))
        step = abstract_step(config, read_base(config, Path(folder)), jax.devices()[:1])
    return sum(step.sizes().values()) + step.saved_bytes("full")


def too_large(needed: int, usable: int) -> str | None:
    """Why a step of at least ``needed`` bytes does not fit in ``usable``; None if it may."""
    if needed <= usable:
        return None
    return f"needs at least {needed / 1e9:,.1f} GB of the {usable / 1e9:,.1f} GB"


def host_bytes() -> int:
    """Memory of this machine, which is that of the device where the device is the CPU."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
