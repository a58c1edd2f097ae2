"""What a row says about which of its messages are trained, in the words of several tools."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from sft_jax.data.read.rows import RowError, shown

# What true means: a number between is a weight of the loss. Ours and OpenAI's `weight`; `loss` is ms-swift's and
# LLaMA-Factory's, `loss_mask` that of NeMo and slime, `training` Axolotl's, `masked` TorchTune's.
_TRAINED = ("train", "weight", "loss_weight", "loss", "loss_mask", "training", "trainable")
_NOT_TRAINED = ("masked",)
FLAGS = (*_TRAINED, *_NOT_TRAINED)
# Names that say something about training in no tool's words that are known here.
_TELLING = re.compile(
    r"((messages?|tokens?|assistant|turns?|responses?|completion|targets?|labels?|samples?|examples?|rows?|chat|sft|is|do"
    r"|to|should|no|not|ignore|skip|use)_)*(loss|loss(es|mask|weights?)|masks?|masked|weights?|train|trained|training"
    r"|trainable)(_(masks?|weights?|scale|details?|flags?|on|turns?))*"
)


def weight_of(message: Mapping[str, Any]) -> float | None:
    """What a message's loss counts; None if it does not say.

    Raises:
        RowError: a flag of the wrong type, or two that contradict each other.
    """
    found = {name: message[name] for name in FLAGS if message.get(name) is not None}
    weights = {_weight(name, value) for name, value in found.items()}
    if len(weights) > 1:
        raise RowError(f"{' and '.join(map(repr, found))} say different things")
    return weights.pop() if weights else None


def weights_of_row(row: Mapping[str, Any], size: int) -> list[float | None]:
    """What the loss of each of ``size`` messages counts, from a column with a flag for each of them.

    Raises:
        RowError: a flag of the row as a whole, lists of another length, or two that contradict each other.
    """
    found: dict[str, list[float]] = {}
    for name in FLAGS:
        value = row.get(name)
        if value is None:
            continue
        if not isinstance(value, list) or len(value) != size:
            raise RowError(
                f"column {name!r} must be a list with a flag for each of the {size} messages, it is {shown(value)} "
                f"(data.*.ignore_columns: [{name}] leaves it out)"
            )
        found[name] = [_weight(name, one) for one in value]
    if len({tuple(weights) for weights in found.values()}) > 1:
        raise RowError(f"the columns {' and '.join(map(repr, found))} say different things")
    return [*next(iter(found.values()), [None] * size)]


def _weight(name: str, value: Any) -> float:
    if not isinstance(value, bool | int | float):
        raise RowError(f"{name!r} must be true, false or a number, it is {shown(value)}")
    if not math.isfinite(value) or value < 0:
        raise RowError(f"{name!r} must be a number that is not negative, it is {value}")
    if name not in _NOT_TRAINED:
        return float(value)
    if value not in (0, 1):
        raise RowError(f"{name!r} must be true or false, it is {value}")
    return 1.0 - float(value)


def refuse_telling(name: str, value: Any, where: str) -> None:
    """Refuse what is not read and plainly says what is trained: numbers or flags under a name that says so.

    Raises:
        RowError: how to say it, or to leave it out.
    """
    numbers = value if isinstance(value, list) else [value]
    if _TELLING.fullmatch(name.lower()) and numbers and all(isinstance(one, bool | int | float) for one in numbers):
        raise RowError(
            f"{where} {name!r} is not understood, and seems to say what is trained; say it as 'train' or 'weight' of a "
            f"message, or leave it out with data.*.ignore_columns: [{name}]"
        )
