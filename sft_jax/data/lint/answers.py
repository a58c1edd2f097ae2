"""Rules about answers: empty, cut off, unfinished, repeated, in conflict."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sft_jax.data.lint.columns import Columns
from sft_jax.data.lint.endings import EMPTY, FINISHED, OPEN
from sft_jax.data.lint.texts import Texts
from sft_jax.data.tokens.examples import Examples

_MOST_STOP = 0.5  # of the answers of a source: where fewer end with a stop token, none has to
_MOST_FINISHED = 0.95  # of the answers of a source: where fewer end as prose does, none has to
_FEWEST = 50  # answers of a source that a rule about most of them needs
_REPEATED_SHARE, _REPEATED_AT_LEAST = 0.01, 10  # different questions with the same answer, of those of the source


def of_each_source(examples: Examples) -> Iterator[np.ndarray]:
    """Yield the examples of each source, int64."""
    order = np.argsort(examples.source, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(examples.source[order])) + 1)


def cut_off(examples: Examples, columns: Columns) -> np.ndarray:
    """Find answers without a stop token, in sources where most have one."""
    found = [
        here[~columns.has_stop[here]]
        for here in of_each_source(examples)
        if columns.has_stop[here].mean() >= _MOST_STOP
    ]
    return _ascending(found)


def unfinished(examples: Examples, columns: Columns, texts: Texts) -> np.ndarray:
    """Find answers that end in the middle of prose, in sources where nearly all end as prose does."""
    found = []
    for here in of_each_source(examples):
        here = here[columns.has_stop[here] & (texts.ending[here] != EMPTY)]
        if len(here) >= _FEWEST and (texts.ending[here] == FINISHED).mean() >= _MOST_FINISHED:
            found.append(here[texts.ending[here] == OPEN])
    return _ascending(found)


def repeated(examples: Examples, columns: Columns) -> tuple[np.ndarray, np.ndarray, int]:
    """Find answers that are given to many different questions of a source.

    Returns:
        The examples with such answers; for each of them, the number of different questions; the number of answers.
    """
    found, num_questions, num_answers = [], [], 0
    for here in of_each_source(examples):
        here = here[columns.begins[here] > 0]
        answers, which = np.unique(columns.answer[here], return_inverse=True)
        pairs = np.unique(np.stack([which.astype(np.uint64), columns.question[here]]), axis=1)
        counts = np.bincount(pairs[0].astype(np.int64), minlength=len(answers))
        limit = max(_REPEATED_AT_LEAST, _REPEATED_SHARE * len(here))
        found.append(here[counts[which] >= limit])
        num_questions.append(counts[which][counts[which] >= limit])
        num_answers += int((counts >= limit).sum())
    examples_found, counts_found = np.concatenate([_none(), *found]), np.concatenate([_none(), *num_questions])
    order = np.argsort(examples_found, kind="stable")
    return examples_found[order], counts_found[order], num_answers


def conflicting(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Find questions with different answers.

    Returns:
        The examples with such questions; for each of them, the number of different answers.
    """
    here = np.flatnonzero(columns.begins >= 2)  # without a question, there is at most a BOS token
    pairs, which = np.unique(np.stack([columns.question[here], columns.answer[here]]), axis=1, return_inverse=True)
    questions, of_pair = np.unique(pairs[0], return_inverse=True)
    counts = np.bincount(of_pair, minlength=len(questions))[of_pair][which.reshape(-1)]
    return here[counts > 1], counts[counts > 1]


def _none() -> np.ndarray:
    return np.zeros(0, np.int64)


def _ascending(found: list[np.ndarray]) -> np.ndarray:
    return np.sort(np.concatenate([_none(), *found]))
