"""Token ids as readable pieces of text, for people who want to see what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pieces(tokenizer: Any, ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[str, bool]]:
    """Pieces of text, in order, each with whether it is trained.

    One piece a token; tokens that hold only part of a character are put together until it is whole, as long as they
    are alike in being trained.
    """
    found: list[tuple[str, bool]] = []
    pending: list[int] = []
    for i, (token, trained) in enumerate(zip(ids, mask, strict=True)):
        pending.append(int(token))
        text = tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        is_last = i + 1 == len(ids) or bool(mask[i + 1]) != bool(trained)
        if "\ufffd" not in text or is_last:
            found.append((text, bool(trained)))
            pending = []
    return found
