"""Reads JSON answers, and compares them by field."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

_FENCE = re.compile(r"```(?:json|JSON)?(.*?)```", re.DOTALL)
_MOST_STARTS = 100  # brackets at which a JSON value after other text is looked for


@dataclass(frozen=True)
class Fields:
    """What of a JSON answer is right, by field; see :func:`compare_fields`."""

    right: dict[str, bool]  # of each field of the expected answer
    extra: list[str]  # fields that the expected answer lacks
    is_json: bool

    @property
    def is_exact(self) -> bool:
        """Whether all fields are right, and there are no others."""
        return self.is_json and all(self.right.values()) and not self.extra


def parse_json(text: str) -> Any | None:
    """Reads the JSON value of an answer as nested values that are equal if they mean the same; None if there is none.

    The whole text is JSON, or its last block in a fence, or an object or a list at its end. Numbers are equal by value,
    strings without the spaces around them. An object with the same key twice is not JSON here: it means two things.

    ``'{"a": 1.0, "b": " x"}'`` and ``'{"b": "x", "a": 1}'`` are equal.
    """
    text = text.strip()
    candidates = [text, *(block.group(1) for block in list(_FENCE.finditer(text))[-1:])]
    starts = [match.start() for match in re.finditer(r"[{\[]", text)][:_MOST_STARTS]
    candidates += [text[start:] for start in starts if _is_closed(text[:start])]
    for one in candidates:
        try:
            value = json.loads(
                one.strip(),
                parse_float=Decimal,
                parse_int=Decimal,
                parse_constant=_refuse,
                object_pairs_hook=_object,
            )
            return _canonical(value)
        except (ValueError, ArithmeticError, RecursionError):
            continue
    return None


def compare_fields(written: Any | None, expected: Any) -> Fields:
    """Compares two values of :func:`parse_json` by field.

    Fields of objects inside objects have names such as ``address.city``; a list is one field. A value that is not an
    object has no fields.

    ``{"a": 1, "c": 3}`` for the expected ``{"a": 1, "b": {"d": 2}}`` → a is right, b.d is wrong, c is extra.
    """
    of_expected, of_written = _flatten(expected), _flatten(written)
    right = {name: name in of_written and of_written[name] == value for name, value in of_expected.items()}
    return Fields(right, [name for name in of_written if name not in of_expected], written is not None)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {}
    fields: dict[str, Any] = {}
    for key, one in value.items():
        name = f"{prefix}{key}"
        fields |= _flatten(one, f"{name}.") if isinstance(one, dict) and one else {name: one}
    return fields


def _is_closed(text: str) -> bool:
    """Whether all brackets are closed: what follows ``{"a":`` is a part of a value, and no answer."""
    return text.count("{") == text.count("}") and text.count("[") == text.count("]")


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_canonical(one) for one in value]
    if isinstance(value, str):
        return value.strip()
    return value if isinstance(value, Decimal) else _Constant(repr(value))


@dataclass(frozen=True)
class _Constant:
    """True, False or None: in Python, True equals 1, and None is no answer."""

    name: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("the same key twice")
    return result


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
