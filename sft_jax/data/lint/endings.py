"""How a text ends: as prose does, in the middle of prose, or otherwise."""

from __future__ import annotations

import re
import unicodedata

EMPTY, FINISHED, OPEN, OTHER = range(4)
_FINAL = set(".!?…。！？।؟۔»”’\"')]}）」』】;:：*_`~|>")
_CONTINUED = set(",，、-–—(")
_FEWEST_WORDS = 4  # of a last line: shorter ones are names, titles and values
_LONG = 40  # words: shorter answers without a whole sentence are phrases, which need no full stop
_SENTENCE_END = re.compile(r"[.!?]\s|[。！？।؟۔]")
_NO_PROSE = re.compile(r"\s*(?:[-*+•·#>|=]|\d+[.)]|[a-zA-Z][.)]\s|\$|\\|//|<)")  # lists, headings, tables, code


def ending(text: str) -> int:
    """Classify a text by its last line.

    ``"It is a river."`` is finished; ``"It is a river. It flows through the old"`` is open. Lists, headings, code,
    phrases, names, values and tags are neither, because they need no full stop.
    """
    text = text.rstrip()
    if not text:
        return EMPTY
    last = text[-1]
    if last in _FINAL or (last not in _CONTINUED and unicodedata.category(last) in ("Po", "Pe", "Pf", "So")):
        return FINISHED
    line = text[text.rfind("\n") + 1 :]
    words = line.split()
    is_cased = words[-1].lower() != words[-1].upper()
    if (is_cased and len(words) < _FEWEST_WORDS) or _NO_PROSE.match(line):
        return OTHER
    if not _SENTENCE_END.search(text) and len(text.split()) < _LONG:
        return OTHER
    word = words[-1].rstrip("".join(_CONTINUED))
    if not word or not is_cased:
        return OPEN if last.isalpha() or last in _CONTINUED else OTHER
    return OPEN if word.isalpha() and word[0].islower() else OTHER
