"""Compares generated answers with reference answers."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from decimal import Decimal

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def same_answer(written: str, gold: str, kind: str) -> bool:
    """Returns whether two answers are equal after normalization; an answer without a match for ``kind`` equals none.

    Ignores reasoning, the text up to the last ``</think>``.

    Args:
        kind: a key of :data:`NORMALIZERS`.
    """
    answer, expected = (NORMALIZERS[kind](text.rpartition("</think>")[2]) for text in (written, gold))
    return answer is not None and answer == expected


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


NORMALIZERS: dict[str, Callable[[str], str | None]] = {
    "exact": _exact,
    "text": _text,
    "number": _number,
    "gsm8k": _gsm8k,
    "choice": _choice,
}
"""Normalizers by value of ``evaluation.answer``."""
