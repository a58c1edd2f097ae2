"""Near duplicates by MinHash (Broder 1997) and locality-sensitive hashing in bands (Leskovec et al., chapter 3).

The minima of ``NUM_BANDS × BAND_SIZE`` permutations of hashes are the signature of an example. Two examples with the
Jaccard similarity s agree in a band of r minima with probability sʳ, so they are compared with probability
1 - (1 - sʳ)ᵇ: 99.9 % at 0.8, 2 % at 0.2. What is compared is decided by the exact similarity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from sft_jax.data.lint.blocks import BLOCK_TOKENS, blocks, chunks
from sft_jax.data.lint.columns import mix, salted
from sft_jax.data.lint.shingles import Choose, Side, shingles, similarity

THRESHOLD = 0.8
NUM_BANDS, BAND_SIZE = 14, 4
FEWEST = 8  # shingles: examples with fewer are not compared, because one other token makes them another example
_NEIGHBOURS = 4  # earlier examples of the same bucket that each example is compared with, and the first one
_MOST_PER_HELD_OUT = 64  # training examples of a bucket that a held-out example is compared with


@dataclass(frozen=True)
class Signatures:
    """The hash of each band of each example; only of those in ``index``, which have enough shingles."""

    index: np.ndarray  # int64 [S], ascending
    bands: np.ndarray  # uint32 [NUM_BANDS, S]


@dataclass(frozen=True)
class Pairs:
    """Pairs of similar examples, and their Jaccard similarity, ordered by ``j`` and then by ``i``."""

    i: np.ndarray
    j: np.ndarray
    similarity: np.ndarray

    def __len__(self) -> int:
        return len(self.i)


def permutations() -> tuple[np.ndarray, np.ndarray]:
    """Return factors and offsets, uint32: ``x · factor + offset`` modulo 2³² is a permutation for an odd factor."""
    numbers = mix(np.arange(1, 2 * NUM_BANDS * BAND_SIZE + 1)) >> np.uint64(32)
    factors, offsets = numbers.astype(np.uint32).reshape(2, -1)
    return factors | np.uint32(1), offsets


def minima(hashes: np.ndarray, chosen: np.ndarray, starts: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the minimum of each permutation over the chosen hashes of each example, uint32 [E].

    Args:
        hashes: uint64 [T].
        chosen: bool [T].
        starts: the first entry of each example.
    """
    values = (hashes >> np.uint64(32)).astype(np.uint32)
    left_out = np.where(chosen, np.uint32(0), np.uint32(2**32 - 1))
    permuted = np.empty_like(values)
    for factor, offset in zip(*permutations(), strict=True):
        np.multiply(values, factor, out=permuted)
        permuted += offset
        permuted |= left_out
        yield np.minimum.reduceat(permuted, starts)


def sign(
    side: Side, index: np.ndarray, choose: Choose, progress: Callable[[int], object] = lambda examples: None
) -> Signatures:
    """Compute the signatures of some examples.

    Args:
        index: the examples, ascending.
        choose: which shingles count.
        progress: called with the number of examples done since the last call.
    """
    kept, bands = [np.zeros(0, np.int64)], [np.zeros((NUM_BANDS, 0), np.uint32)]
    for block in blocks(side.examples, index):
        hashes, is_whole = shingles(block)
        chosen = is_whole & choose(side.columns, block, hashes)
        enough = np.add.reduceat(chosen, block.starts, dtype=np.int64) >= FEWEST
        keys = np.zeros((NUM_BANDS, len(block.index)), np.uint64)
        for number, minimum in enumerate(minima(hashes, chosen, block.starts)):
            band = keys[number // BAND_SIZE]
            band[:] = salted(minimum, band)
        kept.append(block.index[enough])
        bands.append((keys[:, enough] >> np.uint64(32)).astype(np.uint32))
        progress(len(block.index))
    return Signatures(np.concatenate(kept), np.concatenate(bands, axis=1))


def candidates(signatures: Signatures) -> np.ndarray:
    """Return pairs ``i < j`` of examples that agree in a band, int64 [2, P], without repetitions.

    Of a bucket with many examples, each is paired with the first one and with its nearest predecessors.
    """
    found = np.zeros((2, 0), np.int64)
    for keys in signatures.bands:
        order = np.argsort(keys, kind="stable")
        index, sorted_keys = signatures.index[order], keys[order]
        is_new = np.ones(len(order), bool)
        is_new[1:] = sorted_keys[1:] != sorted_keys[:-1]
        first = np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))
        here = np.flatnonzero(~is_new)
        pairs = [np.stack([index[first[here]], index[here]])]
        for offset in range(1, _NEIGHBOURS + 1):
            near = here[here - offset > first[here]]
            pairs.append(np.stack([index[near - offset], index[near]]))
        found = _distinct(np.concatenate([found, *pairs], axis=1))
    return found


def equal_entries(left: np.ndarray, right: np.ndarray, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of all pairs of equal entries, ordered by the right ones and then by the left ones.

    Of ``7 5 7`` and ``5 7``: the pairs 1 and 0, 0 and 1, 2 and 1.

    Args:
        most: the number of pairs of each right entry, if there are more.
    """
    order = np.argsort(left, kind="stable")
    begin = np.searchsorted(left[order], right, "left")
    num = np.searchsorted(left[order], right, "right") - begin
    num = num if most is None else np.minimum(num, most)
    which = np.repeat(np.arange(len(right)), num)
    at = np.arange(len(which)) - np.repeat(np.cumsum(num) - num, num) + begin[which]
    return order[at], which


def candidates_between(left: Signatures, right: Signatures) -> np.ndarray:
    """Return pairs of a left and a right example that agree in a band, int64 [2, P], without repetitions."""
    found = np.zeros((2, 0), np.int64)
    for keys, others in zip(left.bands, right.bands, strict=True):
        at, which = equal_entries(keys, others, _MOST_PER_HELD_OUT)
        pairs = np.stack([left.index[at], right.index[which]])
        found = _distinct(np.concatenate([found, pairs], axis=1))
    return found


def similar(
    left: Side, right: Side, pairs: np.ndarray, choices: tuple[Choose, ...], threshold: float = THRESHOLD
) -> Pairs:
    """Keep the pairs whose exact similarity reaches a threshold for each choice of shingles.

    Returns:
        The pairs, with their similarity for the first choice.
    """
    lengths = left.examples.lengths[pairs[0]].astype(np.int64) + right.examples.lengths[pairs[1]]
    kept, values = [np.zeros((2, 0), np.int64)], [np.zeros(0)]
    for chunk in chunks(lengths, BLOCK_TOKENS):
        few = pairs[:, chunk]
        value = similarity(left, few[0], right, few[1], choices[0])
        for choose in (None, *choices[1:]):
            others = value if choose is None else similarity(left, few[0], right, few[1], choose)
            enough = others >= threshold
            few, value = few[:, enough], value[enough]
            if not len(value):
                break
        kept.append(few)
        values.append(value)
    i, j = np.concatenate(kept, axis=1)
    order = np.lexsort((i, j))
    return Pairs(i[order], j[order], np.concatenate(values)[order])


def _distinct(pairs: np.ndarray) -> np.ndarray:
    keys = np.unique(pairs[1].astype(np.uint64) << np.uint64(32) | pairs[0].astype(np.uint64))
    return np.stack([keys & np.uint64(2**32 - 1), keys >> np.uint64(32)]).astype(np.int64)
