"""The Unicode script of letters, by the names of the characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

_FEWEST = 20  # letters whose names begin with the word: others are not scripts
_NO_SCRIPTS = {"MODIFIER", "FULLWIDTH", "HALFWIDTH", "MATHEMATICAL"}
_TOGETHER = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}  # Japanese text mixes them
_SHORTEST = 20  # letters: texts with fewer have no main script
NONE = 0


@cache
def table() -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the script of each character of the basic plane (uint8 [65536]; 0: none), and the names of scripts."""
    words = [""] * 0x10000
    for code in range(0x10000):
        if unicodedata.category(chr(code)).startswith("L"):
            word = unicodedata.name(chr(code), "").partition(" ")[0]
            words[code] = _TOGETHER.get(word, word)
    values, counts = np.unique(words, return_counts=True)
    known = (str(name) for name, count in zip(values, counts, strict=True) if count >= _FEWEST)
    names = ("", *(name for name in known if name and name not in _NO_SCRIPTS))
    index = {name: i for i, name in enumerate(names)}
    return np.asarray([index.get(word, NONE) for word in words], np.uint8), names


def main_scripts(texts: Sequence[str]) -> np.ndarray:
    """Return the script of most letters of each text, uint8; 0 for texts with few letters, or without a main script."""
    scripts, names = table()
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "replace"), np.uint32)
    script = np.where(codes < 0x10000, scripts[np.minimum(codes, 0xFFFF)], NONE).astype(np.int64)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    counts = np.bincount(owner * len(names) + script, minlength=len(texts) * len(names)).reshape(-1, len(names))
    letters = counts[:, 1:].sum(axis=1)
    main = counts[:, 1:].argmax(axis=1) + 1
    is_main = (letters >= _SHORTEST) & (2 * counts[np.arange(len(texts)), main] > letters)
    return np.where(is_main, main, NONE).astype(np.uint8)
