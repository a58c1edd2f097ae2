"""Decodes token ids as readable text, token by token, to show which tokens are supervised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pieces(tokenizer: Any, ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[str, bool]]:
    """Decode each token, and return its text with whether it is supervised.

    Adjacent tokens that each hold only a part of a character are decoded together, if their mask is the same.
    """
    decoded: list[tuple[str, bool]] = []
    pending: list[int] = []
    for i, (token, is_supervised) in enumerate(zip(ids, mask, strict=True)):
        pending.append(int(token))
        text = tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        is_last = i + 1 == len(ids) or bool(mask[i + 1]) != bool(is_supervised)
        if "\ufffd" not in text or is_last:
            decoded.append((text, bool(is_supervised)))
            pending = []
    return decoded
