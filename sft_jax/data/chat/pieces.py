"""Decodes token ids as readable text, token by token, to show which tokens are supervised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pieces(tokenizer: Any, ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[str, bool]]:
    """Decode each token, and return its text with whether it is supervised.

    Adjacent tokens that each hold only a part of a character are decoded together, if their mask is the same.
    """
    return [(text, bool(mask[start])) for text, start, _ in spans(tokenizer, ids, mask)]


def spans(tokenizer: Any, ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[str, int, int]]:
    """Like :func:`pieces`, but returns each text with its first token and the one after its last."""
    decoded: list[tuple[str, int, int]] = []
    start = 0
    for i, is_supervised in enumerate(mask):
        text = tokenizer.decode(
            [int(one) for one in ids[start : i + 1]], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        is_last = i + 1 == len(ids) or bool(mask[i + 1]) != bool(is_supervised)
        if "\ufffd" not in text or is_last:
            decoded.append((text, start, i + 1))
            start = i + 1
    return decoded
