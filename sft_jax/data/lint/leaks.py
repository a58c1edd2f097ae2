"""Leaks: held-out examples whose question, or the whole of them, is also in the training data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sft_jax.data.lint.blocks import Block
from sft_jax.data.lint.columns import Columns
from sft_jax.data.lint.minhash import Pairs, candidates_between, equal_entries, sign, similar
from sft_jax.data.lint.shingles import Choose, Commonness, Side, common_limit, of_all, of_question, of_targets

_SHORTEST_QUESTION = 2  # tokens: shorter ones are a BOS token or nothing


@dataclass(frozen=True)
class Leaks:
    """Leaked examples.

    Attributes:
        held_out: held-out examples, ascending.
        training: the training examples that they are in, ascending.
        first: for each entry of ``held_out``, the first training example.
        how: for each entry of ``held_out``, what is the same.
    """

    held_out: np.ndarray
    training: np.ndarray
    first: np.ndarray
    how: list[str]


def find_leaks(
    train: Side,
    held_out: Side,
    first: np.ndarray,
    common: Commonness,
    progress: Callable[[int], object] = lambda examples: None,
) -> Leaks:
    """Find held-out examples that are in the training data, exactly or nearly.

    Args:
        first: the first exact duplicate of each training example.
        progress: called with the number of examples done since the last call; twice for all examples.
    """
    found: dict[int, tuple[int, str]] = {}
    training = np.zeros(len(train.examples), bool)

    def add(pairs: np.ndarray, how: Callable[[int], str]) -> None:
        training[pairs[0]] = True
        for at, (i, j) in enumerate(pairs.T.tolist()):
            found.setdefault(j, (i, how(at)))

    add(np.stack(equal_entries(train.columns.whole, held_out.columns.whole)), lambda at: "the same conversation")
    add(_same_questions(train.columns, held_out.columns), lambda at: "the same question")

    def is_rare(columns: Columns, block: Block, hashes: np.ndarray) -> np.ndarray:
        return ~common.of(hashes)

    def is_rare_question(columns: Columns, block: Block, hashes: np.ndarray) -> np.ndarray:
        return ~common.of(hashes) & of_question(columns, block, hashes)

    for what, signed, choices in (
        ("conversation", is_rare, (of_all, is_rare, of_targets)),
        ("question", is_rare_question, (of_question, is_rare_question)),
    ):
        near = _near(train, held_out, first, signed, choices, progress)
        add(np.stack([near.i, near.j]), _nearly(what, near))
    is_copy = training[first]  # what is near one of several exact duplicates is near all of them
    which = np.asarray(sorted(found), np.int64)
    return Leaks(
        which,
        np.flatnonzero(training | is_copy),
        np.asarray([found[j][0] for j in which.tolist()], np.int64),
        [found[j][1] for j in which.tolist()],
    )


def _near(
    train: Side,
    held_out: Side,
    first: np.ndarray,
    signed: Choose,
    choices: tuple[Choose, ...],
    progress: Callable[[int], object],
) -> Pairs:
    distinct = np.flatnonzero(first == np.arange(len(first)))
    left = sign(train, distinct, signed, progress)
    progress(len(first) - len(distinct))
    right = sign(held_out, np.arange(len(held_out.examples)), signed, progress)
    return similar(train, held_out, candidates_between(left, right), choices)


def _nearly(what: str, near: Pairs) -> Callable[[int], str]:
    return lambda at: f"nearly the same {what}, similarity {near.similarity[at]:.2f}"


def _same_questions(train: Columns, held_out: Columns) -> np.ndarray:
    """Pairs of examples with the same question, unless so many training examples have it that it is none."""
    values, counts = np.unique(train.question, return_counts=True)
    asked = values[counts <= common_limit(len(train.question))]
    left = np.flatnonzero((train.begins >= _SHORTEST_QUESTION) & np.isin(train.question, asked))
    right = np.flatnonzero(held_out.begins >= _SHORTEST_QUESTION)
    i, j = equal_entries(train.question[left], held_out.question[right])
    return np.stack([left[i], right[j]])
