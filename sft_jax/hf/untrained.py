"""Detects special tokens whose embeddings the base model never trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from sft_jax.hf.reader import Reader

_SAMPLED = 256  # embeddings whose median norm is the reference
_SHORT = 0.05  # an untrained embedding has a smaller norm, relative to the median
_NEAR = 0.02  # two untrained embeddings are closer to each other, relative to the median norm


def chat_tokens(tokenizer: Any, stop_ids: Collection[int]) -> list[int]:
    """Ids of the stop tokens, and of the special tokens that occur in the chat templates."""
    template = tokenizer.chat_template or ""
    sources = "".join(template.values()) if isinstance(template, dict) else template
    named = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special and token.content in sources)
    return sorted({*stop_ids, *named})


def untrained_tokens(reader: Reader, name: str, ids: Iterable[int]) -> list[int]:
    """Returns the ids whose embedding is zero, tiny, or nearly equal to that of another id in ``ids``.

    Skips ids beyond the embeddings in the file, which belong to added tokens.

    Args:
        name: the tensor of the embeddings.
    """
    vocab_size = reader.shape(name)[0]
    embeddings = {i: _embedding(reader, name, i) for i in ids if i < vocab_size}
    sampled = np.unique(np.linspace(0, vocab_size - 1, min(_SAMPLED, vocab_size)).astype(int))
    median = float(np.median([np.linalg.norm(_embedding(reader, name, int(i))) for i in sampled]))
    return [
        i
        for i, one in embeddings.items()
        if np.linalg.norm(one) < _SHORT * median
        or any(np.linalg.norm(one - other) < _NEAR * median for j, other in embeddings.items() if j != i)
    ]


def _embedding(reader: Reader, name: str, i: int) -> np.ndarray:
    return reader.read(name, i, i + 1)[0].astype(np.float32)
