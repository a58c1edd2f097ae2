"""Shingles: runs of consecutive tokens, as hashes, and how many examples have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sft_jax.data.lint.blocks import Block, blocks, read_block
from sft_jax.data.lint.columns import Columns, mix, salted
from sft_jax.data.tokens.examples import Examples

SIZE = 3  # tokens of a shingle
_COMMON_SHARE = 0.01  # of the examples: what more of them have is a template or a system prompt
_COMMON_AT_LEAST = 20  # examples; in small data, a quarter of them
_COMMON_FEWEST = 3
_BITS = 24  # of the table of counts


def common_limit(num: int) -> float:
    """Return in how many of ``num`` examples a text may be without being common: 3 of 8, 20 of 1,000, 1 % of more."""
    return max(_COMMON_SHARE * num, min(_COMMON_AT_LEAST, num / 4), _COMMON_FEWEST)


@dataclass(frozen=True)
class Side:
    """Examples to compare, training or held-out ones, with their columns."""

    examples: Examples
    columns: Columns


def shingles(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """Hash all shingles of a block; different shingles have different hashes, for ids below 2²¹.

    Returns:
        Hashes (uint64 [T]); entry ``t`` is that of the tokens ``t … t + SIZE - 1``. And whether they are of one
        example (bool [T]).
    """
    ids = np.concatenate([block.ids, np.zeros(SIZE - 1, np.int32)]).astype(np.uint64)
    hashes = ids[: len(block.ids)]
    for offset in range(1, SIZE):
        hashes = (hashes << np.uint64(21)) ^ ids[offset : offset + len(block.ids)]
    return mix(hashes), block.position + SIZE <= np.repeat(block.lengths, block.lengths)


class Commonness:
    """Counts in how many examples a shingle is. Shingles that share one of 2²⁴ counters are counted together."""

    def __init__(self, examples: Examples, progress: Callable[[int], object] = lambda examples: None):
        counts = np.zeros(1 << _BITS, np.uint32)
        for block in blocks(examples):
            hashes, is_whole = shingles(block)
            owner = block.owner[is_whole].astype(np.uint64) << np.uint64(_BITS)
            once = np.sort(owner | self._counter(hashes[is_whole]))
            is_new = np.ones(len(once), bool)
            is_new[1:] = once[1:] != once[:-1]
            counter, num = np.unique(once[is_new] & np.uint64((1 << _BITS) - 1), return_counts=True)
            counts[counter] += num.astype(np.uint32)
            progress(len(block.index))
        self._is_common = counts > common_limit(len(examples))

    def of(self, hashes: np.ndarray) -> np.ndarray:
        """Return which shingles are common, bool."""
        return self._is_common[self._counter(hashes)]

    @staticmethod
    def _counter(hashes: np.ndarray) -> np.ndarray:
        return hashes >> np.uint64(64 - _BITS)


Choose = Callable[[Columns, Block, np.ndarray], np.ndarray]  # which shingles of a block count, bool [T]


def of_all(columns: Columns, block: Block, hashes: np.ndarray) -> np.ndarray:
    """Choose all shingles."""
    return np.ones(len(hashes), bool)


def of_question(columns: Columns, block: Block, hashes: np.ndarray) -> np.ndarray:
    """Choose the shingles before the answer."""
    return block.position + SIZE <= np.repeat(columns.begins[block.index], block.lengths)


def of_targets(columns: Columns, block: Block, hashes: np.ndarray) -> np.ndarray:
    """Choose the shingles that end with a supervised token."""
    return np.concatenate([block.weights[SIZE - 1 :] > 0, np.zeros(min(SIZE - 1, len(block.ids)), bool)])


def similarity(left: Side, i: np.ndarray, right: Side, j: np.ndarray, choose: Choose) -> np.ndarray:
    """Return the exact Jaccard similarity of the shingles of each pair of examples, float64; 0 without shingles.

    Args:
        i, j: the examples of the pairs.
    """
    sides = []
    for side, index in ((left, i), (right, j)):
        block = read_block(side.examples, index)
        hashes, is_whole = shingles(block)
        chosen = is_whole & choose(side.columns, block, hashes)
        pair = block.owner[chosen]
        keys, where = np.unique(salted(hashes[chosen], pair), return_index=True)
        sides.append((keys, pair[where]))
    (a, pair_of_a), (b, pair_of_b) = sides
    _, where, _ = np.intersect1d(a, b, assume_unique=True, return_indices=True)
    both = np.bincount(pair_of_a[where], minlength=len(i))
    either = np.bincount(pair_of_a, minlength=len(i)) + np.bincount(pair_of_b, minlength=len(i)) - both
    return both / np.maximum(either, 1)
