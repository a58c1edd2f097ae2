"""Supervised fine-tuning of language models in JAX: a Hugging Face model in, a tuned Hugging Face model out.

This package re-exports the functions and classes of :mod:`sft_jax.api`, and imports jax on the first access to one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sft_jax.version import __version__ as __version__
from sft_jax.without_torch import leave_out_notice

if TYPE_CHECKING:
    from sft_jax.api import (
        CheckFailed,
        Config,
        Event,
        Model,
        Run,
        UserError,
        check,
        evaluate,
        export,
        inspect,
        load,
        load_config,
        plan,
        train,
    )

__all__ = [
    "CheckFailed", "Config", "Event", "Model", "Run", "UserError",
    "check", "evaluate", "export", "inspect", "load", "load_config", "plan", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in __all__:
        leave_out_notice()
        from sft_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'sft_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
