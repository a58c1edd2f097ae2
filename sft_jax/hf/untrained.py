"""Special tokens that a base model has and was never trained with: their rows of the token table tell nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from sft_jax.hf.reader import TensorReader

_TABLE = "model.embed_tokens.weight"
_SAMPLED = 256  # rows that tell how long a trained one is
_SHORT = 0.05  # of the usual length
_NEAR = 0.02  # of the usual length, between two rows


def chat_tokens(tokenizer: Any, stop_ids: Collection[int]) -> list[int]:
    """The tokens that end turns, and the special ones that the chat templates name."""
    given = tokenizer.chat_template or ""
    sources = "".join(given.values()) if isinstance(given, dict) else given
    named = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special and token.content in sources)
    return sorted({*stop_ids, *named})


def untrained_rows(reader: TensorReader, ids: Iterable[int]) -> list[int]:
    """Those of the ids whose rows of the token table are zero, tiny, or like the row of another one of them.

    Rows that the file does not have are of tokens that are added, and not told here.
    """
    num_rows = reader.shape(_TABLE)[0]
    rows = {i: _row(reader, i) for i in ids if i < num_rows}
    places = np.unique(np.linspace(0, num_rows - 1, min(_SAMPLED, num_rows)).astype(int))
    usual = float(np.median([np.linalg.norm(_row(reader, int(i))) for i in places]))
    return [
        i
        for i, row in rows.items()
        if np.linalg.norm(row) < _SHORT * usual
        or any(np.linalg.norm(row - other) < _NEAR * usual for j, other in rows.items() if j != i)
    ]


def _row(reader: TensorReader, i: int) -> np.ndarray:
    return reader.read(_TABLE, i, i + 1)[0].astype(np.float32)
