"""When a written answer counts as the right one."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from decimal import Decimal

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def same_answer(written: str, gold: str, kind: str) -> bool:
    """Whether two answers are equal once normalised; an answer in which nothing is found equals none.

    What was thought before it, up to the last ``</think>``, is not part of an answer.

    Args:
        kind: a key of :data:`NORMALIZERS`.
    """
    found, right = (NORMALIZERS[kind](text.rpartition("</think>")[2]) for text in (written, gold))
    return found is not None and found == right


def _exact(text: str) -> str | None:
    return text.strip()


def _text(text: str) -> str | None:
    """Lower case, no punctuation, no articles, single spaces: as SQuAD is scored (Rajpurkar et al. 2016).

    ``"  The Danube."`` → ``"danube"``
    """
    words = text.casefold().translate(_PUNCTUATION).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _number(text: str) -> str | None:
    """The last number: ``"So he pays $1,200.00."`` → ``"1200"``."""
    found = _NUMBER.findall(text)
    return _canonical(found[-1]) if found else None


def _gsm8k(text: str) -> str | None:
    """The number after ``####``, where GSM8K puts the final answer (Cobbe et al. 2021)."""
    found = re.search(rf"####\s*\$?\s*({_NUMBER.pattern})", text)
    return _canonical(found.group(1)) if found else None


def _choice(text: str) -> str | None:
    """The first letter that stands alone, of multiple-choice answers: ``"(B) because …"`` → ``"B"``."""
    found = re.search(r"\b([A-J])\b", text)
    return found.group(1) if found else None


def _canonical(number: str) -> str:
    value = Decimal(number.replace(",", "")).normalize()
    return f"{value:f}" if value else "0"  # minus nought is nought


NORMALIZERS: dict[str, Callable[[str], str | None]] = {
    "exact": _exact,
    "text": _text,
    "number": _number,
    "gsm8k": _gsm8k,
    "choice": _choice,
}
"""What is compared, by the value of ``evaluation.answer``."""
