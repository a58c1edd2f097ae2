"""Finds the training examples with the highest loss, where wrong labels hide (Northcutt et al. 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft_jax.data.chat.pieces import spans
from sft_jax.data.tokens.examples import Examples
from sft_jax.evaluation.likelihood import TokenScores

MOST_EXAMPLES = 20_000  # that are read
_NUM_TOKENS = 5  # of an example that are listed


@dataclass(frozen=True)
class HardToken:
    """A supervised token, or several that share a character."""

    text: str
    loss: float
    position: int  # in the example, from 0


@dataclass(frozen=True)
class HardExample:
    """A training example with a high loss per supervised token."""

    source: str  # file
    row: int
    loss: float  # mean over the supervised tokens, without their weights
    num_targets: int
    tokens: list[HardToken]  # those with the highest loss
    prompt: str  # text before the first supervised token
    answer: str  # text from the first supervised token on
    shown: list[tuple[str, float | None]]  # spans of the whole text, and the loss of those that are supervised


def candidates(examples: Examples) -> Examples:
    """All examples, or :data:`MOST_EXAMPLES` that are spread evenly over them."""
    if len(examples) <= MOST_EXAMPLES:
        return examples
    chosen = np.linspace(0, len(examples) - 1, MOST_EXAMPLES).round().astype(int)
    columns = {name: getattr(examples, name)[chosen] for name in ("source", "starts", "lengths", "row")}
    return dataclasses.replace(examples, **columns)


def hardest(examples: Examples, scores: TokenScores, tokenizer: Any, num: int) -> list[HardExample]:
    """The ``num`` examples with the highest mean loss, the highest first.

    Args:
        scores: of ``examples``, under the tuned model.
    """
    means = np.zeros(len(examples))
    for i in range(len(examples)):
        means[i] = _losses(examples, scores, i).mean(dtype=np.float64)
    order = np.argsort(-means, kind="stable")[:num]
    return [_hard_example(examples, scores, tokenizer, int(i), float(means[i])) for i in order]


def _losses(examples: Examples, scores: TokenScores, i: int) -> np.ndarray:
    """The losses of the supervised tokens of an example; its first token is never predicted."""
    return -scores.log_prob[scores.starts[i] : scores.starts[i + 1]][examples[i][1][1:] > 0]


def _hard_example(examples: Examples, scores: TokenScores, tokenizer: Any, i: int, loss: float) -> HardExample:
    ids, mask = examples[i]
    supervised = mask > 0
    supervised[0] = False
    losses = np.zeros(len(ids))
    losses[supervised] = _losses(examples, scores, i)
    shown, tokens = [], []
    for text, start, stop in spans(tokenizer, ids.tolist(), supervised.tolist()):
        of_span = float(losses[start:stop].max()) if supervised[start] else None
        shown.append((text, of_span))
        if of_span is not None:
            tokens.append(HardToken(text, of_span, start))
    first = int(np.flatnonzero(supervised)[0])
    decode: Callable[[list[int]], str] = tokenizer.decode
    return HardExample(
        examples.names[examples.source[i]],
        int(examples.row[i]),
        loss,
        int(supervised.sum()),
        sorted(tokens, key=lambda token: -token.loss)[:_NUM_TOKENS],
        decode(ids[:first].tolist()),
        decode(ids[first:].tolist()),
        shown,
    )
