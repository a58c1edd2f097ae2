"""How a text ends: as prose does, in the middle of prose, or otherwise."""

from __future__ import annotations

import re
import unicodedata

EMPTY, FINISHED, OPEN, OTHER = range(4)
_FINAL = set(".!?…。！？।؟۔»”’\"')]}）」』】;:：*_`~|>")
_CONTINUED = set(",，、-–—(")
_FEWEST_WORDS = 4  # of a last line: shorter ones are names, titles and values
_NO_PROSE = re.compile(r"\s*(?:[-*+•·#>|=]|\d+[.)]|[a-zA-Z][.)]\s|\$|\\|//|<)|.*(?:https?://\S*|[=<>{}\\|_/;]\S*)$")


def ending(text: str) -> int:
    """Classify a text by its last line.

    ``"It is a river."`` is finished, ``"It is a river which flows"`` is open. Lists, headings, code, formulas, single
    words and numbers are neither, because they need no full stop.
    """
    text = text.rstrip()
    if not text:
        return EMPTY
    last = text[-1]
    if last in _FINAL or (last not in _CONTINUED and unicodedata.category(last) in ("Po", "Pe", "Pf", "So")):
        return FINISHED
    line = text[text.rfind("\n") + 1 :]
    if len(line.split()) < _FEWEST_WORDS or _NO_PROSE.match(line):
        return OTHER
    return OPEN if last.isalpha() or last in _CONTINUED else OTHER
