"""Reads several accepted answers of a row; only held-out data may have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft_jax.data.read.messages import checked, read_json
from sft_jax.data.read.rows import RowError, shown

COLUMN = "answers"  # beside the answer
# Columns that hold the answer, by format, in the order in which they are looked for.
_ANSWER = {
    "alpaca": ("output",),
    "question-answer": ("answer", "response", "output"),
    "prompt-completion": ("completion",),
    "messages": (),
    "sharegpt": (),
}


def read_accepted(
    row_format: str, row: Mapping[str, Any], is_held_out: bool
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Read the accepted answers of a row: ``answer: ["4", "four"]``, and ``answers`` beside an answer.

    Training data keep the column ``answers``, which is not read.

    Returns:
        The row with one answer, the first; and all accepted answers besides that of the row.

    Raises:
        RowError: several answers in training data, or ``answers`` is not a list of texts.
    """
    names = _ANSWER.get(row_format)
    if names is None:
        return row, ()
    name = next((one for one in names if one in row), None)
    accepted: tuple[str, ...] = ()
    if name is not None and _is_texts(row[name]):
        if not is_held_out:
            raise RowError(
                f"{name!r} is a list of texts, and only held-out data may have several accepted answers; keep one, or "
                "write a row for each"
            )
        first, *others = (checked(one, name) for one in row[name])
        row, accepted = {**row, name: first}, tuple(others)
    if is_held_out and row.get(COLUMN) is not None:
        value = read_json(row[COLUMN], repr(COLUMN)) if isinstance(row[COLUMN], str) else row[COLUMN]
        if not _is_texts(value):
            raise RowError(
                f"{COLUMN!r} must be a list of texts that count as right, it is {shown(value)} (ignore the column with "
                f"data.*.ignore_columns: [{COLUMN}])"
            )
        accepted += tuple(checked(one, COLUMN) for one in value)
        row = {key: one for key, one in row.items() if key != COLUMN}
    return row, accepted


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(one, str) for one in value)
