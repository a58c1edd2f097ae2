"""Reads many examples at a time, as flat arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sft_jax.data.tokens.examples import Examples

BLOCK_TOKENS = 1 << 18  # of a block: its arrays stay in the caches of a CPU


@dataclass(frozen=True)
class Block:
    """Several examples, one after another.

    With examples of 3 and 2 tokens: ``starts`` 0 3, ``lengths`` 3 2, ``owner`` 0 0 0 1 1, ``position`` 0 1 2 0 1.
    """

    index: np.ndarray  # int64 [E], the examples
    ids: np.ndarray  # int32 [T]
    weights: np.ndarray  # float32 [T], loss mask
    starts: np.ndarray  # int64 [E]
    lengths: np.ndarray  # int64 [E]

    @property
    def owner(self) -> np.ndarray:
        """The example of each token, counted from the first one of the block, int64 [T]."""
        return np.repeat(np.arange(len(self.index)), self.lengths)

    @property
    def position(self) -> np.ndarray:
        """The position of each token in its example, int64 [T]."""
        return np.arange(len(self.ids)) - np.repeat(self.starts, self.lengths)


def read_block(examples: Examples, index: np.ndarray) -> Block:
    """Read some examples; an example may be there several times."""
    lengths = examples.lengths[index].astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    ids, weights = np.empty(lengths.sum(), np.int32), np.empty(lengths.sum(), np.float32)
    at = np.arange(len(ids)) + np.repeat(examples.starts[index] - starts, lengths)  # in the arrays of the source
    source = examples.source[index]
    for number in np.unique(source):
        part = examples.parts[number]
        here = slice(None) if (source == number).all() else np.repeat(source == number, lengths)
        ids[here], weights[here] = part.ids[at[here]], part.weights[part.codes[at[here]]]
    return Block(index, ids, weights, starts, lengths)


def blocks(examples: Examples, index: np.ndarray | None = None, size: int = BLOCK_TOKENS) -> Iterator[Block]:
    """Yield all examples, or some, in blocks of about ``size`` tokens; a longer example is a block of its own."""
    index = np.arange(len(examples)) if index is None else index
    for chunk in chunks(examples.lengths[index], size):
        yield read_block(examples, index[chunk])


def chunks(lengths: np.ndarray, size: int) -> Iterator[slice]:
    """Split a sequence of lengths into slices whose sums are at most ``size``, or that have one length only."""
    ends = np.cumsum(lengths, dtype=np.int64)
    first = 0
    while first < len(ends):
        done = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + size, side="right")))
        yield slice(first, last)
        first = last
