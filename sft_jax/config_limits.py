"""Limits of the numbers in a config: what is beyond them would take all memory, or all time, before it fails."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from sft_jax.errors import UserError

MOST = 2**31 - 1  # of every integer that has no limit of its own
STEP_TOKENS = 2**31 - 1  # tokens of a global batch
_LIMITS: dict[str, float] = {
    "lora.rank": 2**16,
    "data.max_length": 2**22,
    "data.num_workers": 1024,
    "data.*.weight": 10_000,
    "optimizer.learning_rate": 1e38,  # of float32
    "training.num_train_epochs": 100_000,
    "training.batch_size": 2**20,
    "training.seed": 2**32 - 1,
    "evaluation.max_new_tokens": 2**22,
    "evaluation.batch_size": 2**20,
}
_PLANNED_STEPS = 1_000_000  # of a run that is not streamed, whose steps are planned in advance
_SOURCES = ("data.train", "data.eval", "evaluation.documents")


def check_limits(config: Any) -> None:
    """Check that all numbers of a config are finite and within their limits.

    Raises:
        UserError: one is not; the error names its key.
    """
    for key, value in _numbers(config, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}: {value} is not a finite number")
        limit = _LIMITS.get(key, MOST if isinstance(value, int) else math.inf)
        if value > limit:
            raise UserError(f"{key}: {_short(value)} is more than {limit:,.0f}")
        if value < -MOST:
            raise UserError(f"{key}: {_short(value)} is less than {-MOST:,}")
    training, length = config.training, config.data.max_length
    if training.seed < 0:
        raise UserError(f"training.seed: {training.seed} is negative")
    if training.batch_size * length > STEP_TOKENS:
        raise UserError(
            f"training.batch_size: {training.batch_size:,} sequences of data.max_length {length:,} are more than "
            f"{STEP_TOKENS:,} tokens in a step"
        )
    if not config.data.streaming and (training.max_steps or 0) > _PLANNED_STEPS:
        raise UserError(
            f"training.max_steps: {training.max_steps:,} is more than {_PLANNED_STEPS:,}; set data.streaming=true for "
            "longer runs"
        )


def _numbers(section: Any, prefix: str) -> Iterator[tuple[str, int | float]]:
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{key}.")
        elif key in _SOURCES:
            for source in value:
                yield from _numbers(source, "data.*.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def _short(value: float) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if abs(value) < 10**24 else f"{str(abs(value))[:6]}… with {len(str(abs(value)))} digits"
