"""Compares generated answers with reference answers."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sft_jax.evaluation.json_answers import Fields, compare_fields, parse_json

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Grade:
    """Whether an answer is right; for JSON answers also which fields are."""

    right: bool
    fields: Fields | None


def grade(written: str, accepted: Sequence[str], kind: str) -> Grade:
    """Compares an answer with all accepted ones; fields are those of the accepted answer that agrees in most of them.

    Args:
        kind: a key of :data:`NORMALIZERS`.
    """
    right = any(same_answer(written, one, kind) for one in accepted)
    if kind != "json":
        return Grade(right, None)
    answer = normalized(written, kind)
    compared = [compare_fields(answer, normalized(one, kind)) for one in accepted]
    return Grade(right, max(compared, key=lambda one: (one.is_exact, sum(one.right.values()) - len(one.extra))))


def normalized(text: str, kind: str) -> Any | None:
    """Normalizes an answer without its reasoning, the text up to the last ``</think>``; None if it has no match."""
    return NORMALIZERS[kind](text.rpartition("</think>")[2])


def same_answer(written: str, gold: str, kind: str) -> bool:
    """Returns whether two answers are equal after normalization; an answer without a match for ``kind`` equals none.

    Args:
        kind: a key of :data:`NORMALIZERS`.
    """
    answer = normalized(written, kind)
    return answer is not None and answer == normalized(gold, kind)


def _exact(text: str) -> str | None:
    return text.strip()


def _text(text: str) -> str | None:
    """Lower case without punctuation and articles, single spaces: the SQuAD metric (Rajpurkar et al. 2016).

    ``"  The Danube."`` → ``"danube"``
    """
    words = text.casefold().translate(_PUNCTUATION).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _number(text: str) -> str | None:
    """The last number: ``"So he pays $1,200.00."`` → ``"1200"``."""
    numbers = _NUMBER.findall(text)
    return _canonical(numbers[-1]) if numbers else None


def _gsm8k(text: str) -> str | None:
    """The number after ``####``, where GSM8K puts the final answer (Cobbe et al. 2021)."""
    match = re.search(rf"####\s*\$?\s*({_NUMBER.pattern})", text)
    return _canonical(match.group(1)) if match else None


def _choice(text: str) -> str | None:
    """The first standalone letter of a multiple-choice answer: ``"(B) because …"`` → ``"B"``."""
    match = re.search(r"\b([A-J])\b", text)
    return match.group(1) if match else None


def _canonical(number: str) -> str:
    value = Decimal(number.replace(",", "")).normalize()
    return f"{value:f}" if value else "0"  # -0 is 0


NORMALIZERS: dict[str, Callable[[str], Any | None]] = {
    "exact": _exact,
    "text": _text,
    "number": _number,
    "gsm8k": _gsm8k,
    "choice": _choice,
    "json": parse_json,
}
"""Normalizers by value of ``evaluation.answer``."""
