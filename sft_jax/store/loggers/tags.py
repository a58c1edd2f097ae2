"""The tags of metrics in TensorBoard and the services: grouped, because these draw a section per group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft_jax.tree import flatten

_NAMED = {"real_tokens_per_second": "speed/tokens_per_second", "step_seconds": "speed/step_seconds"}
_BY_SOURCE = {"source_loss": "loss", "eval_source_loss": "eval_loss"}


def tagged(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a row of ``metrics.jsonl`` by tag, without those that are null.

    >>> tagged({"step": 1, "loss": 0.5, "step_seconds": 0.1, "eval_loss": None, "source_loss": {"a.jsonl": 0.5}})
    {'train/loss': 0.5, 'speed/step_seconds': 0.1, 'source/a.jsonl/loss': 0.5}
    """
    flat = flatten({key: value for key, value in row.items() if key != "step"})
    return {_tag(*path): value for path, value in flat.items() if value is not None}


def _tag(key: str, *name: str) -> str:
    if name:
        return f"source/{'/'.join(name).strip('/')}/{_BY_SOURCE.get(key, key)}"
    if key in _NAMED:
        return _NAMED[key]
    if key.endswith("_tokens"):
        return f"tokens/{key}"
    for group in ("eval", "memory"):
        if key.startswith(f"{group}_"):
            return f"{group}/{key.removeprefix(f'{group}_')}"
    return f"train/{key}"
