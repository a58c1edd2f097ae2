"""Reads flags and loss weights of messages, under the names that several training libraries use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sft_jax.data.read.rows import RowError, shown

# Flags that are true for supervised messages; other numbers are loss weights. OpenAI uses `weight`, ms-swift and
# LLaMA-Factory `loss`, NeMo and slime `loss_mask`, Axolotl `training`. `masked` of torchtune is the opposite.
_TRAINED = ("train", "weight", "loss_weight", "loss", "loss_mask", "training", "trainable")
_NOT_TRAINED = ("masked",)
FLAGS = (*_TRAINED, *_NOT_TRAINED)
_LARGEST = 10_000  # loss weight
# Names that look like flags or loss weights, but that no supported library uses.
_FLAG_LIKE = re.compile(
    r"((messages?|tokens?|assistant|turns?|responses?|completion|targets?|labels?|samples?|examples?|rows?|chat|sft|is|do"
    r"|to|should|no|not|ignore|skip|use)_)*(loss|loss(es|mask|weights?)|masks?|masked|weights?|train|trained|training"
    r"|trainable)(_(masks?|weights?|scale|details?|flags?|on|turns?))*"
)


def weight_of(message: Mapping[str, Any]) -> float | None:
    """Return the loss weight of a message; None if it has no flag.

    Raises:
        RowError: a flag has the wrong type, or two flags contradict each other.
    """
    flags = {name: message[name] for name in FLAGS if message.get(name) is not None}
    weights = {_weight(name, value) for name, value in flags.items()}
    if len(weights) > 1:
        raise RowError(f"{' and '.join(map(repr, flags))} contradict each other")
    return weights.pop() if weights else None


def weights_of_row(row: Mapping[str, Any], size: int) -> list[float | None]:
    """Return the loss weight of each of ``size`` messages, from a column that lists one flag per message.

    Raises:
        RowError: a column is not a list of ``size`` flags, or two columns contradict each other.
    """
    columns: dict[str, list[float]] = {}
    for name in FLAGS:
        value = row.get(name)
        if value is None:
            continue
        if not isinstance(value, list) or len(value) != size:
            raise RowError(
                f"column {name!r} must be a list with a flag for each of the {size} messages, it is {shown(value)} "
                f"(ignore it with data.*.ignore_columns: [{name}])"
            )
        columns[name] = [_weight(name, one) for one in value]
    if len({tuple(weights) for weights in columns.values()}) > 1:
        raise RowError(f"the columns {' and '.join(map(repr, columns))} contradict each other")
    return [*next(iter(columns.values()), [None] * size)]


def _weight(name: str, value: Any) -> float:
    if not isinstance(value, bool | int | float):
        raise RowError(f"{name!r} must be true, false or a number, it is {shown(value)}")
    if not 0 <= value <= _LARGEST:  # an integer may be too large to be a float, and NaN is in no range
        raise RowError(f"{name!r} must be between 0 and {_LARGEST:,}, it is {shown(value)}")
    if name not in _NOT_TRAINED:
        return float(value)
    if value not in (0, 1):
        raise RowError(f"{name!r} must be true or false, it is {value}")
    return 1.0 - float(value)


def refuse_unknown_flag(name: str, value: Any, where: str) -> None:
    """Refuse an unused key or column that looks like a flag or a loss weight, by its name and type.

    Raises:
        RowError: it does; the message names the supported keys.
    """
    numbers = value if isinstance(value, list) else [value]
    if _FLAG_LIKE.fullmatch(name.lower()) and numbers and all(isinstance(one, bool | int | float) for one in numbers):
        raise RowError(
            f"{where} {name!r} is not supported, but looks like a loss mask; use 'train' or 'weight' of a message "
            f"instead, or ignore it with data.*.ignore_columns: [{name}]"
        )
