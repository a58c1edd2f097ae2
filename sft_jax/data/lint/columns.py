"""One pass over the tokens: where the last answer of each example lies, and hashes to compare examples by.

The *answer* of an example is its last run of supervised tokens, and the *question* is everything before. In a
conversation of several turns, the question therefore includes the earlier turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sft_jax.data.lint.blocks import Block, blocks
from sft_jax.data.tokens.examples import Examples

_ODD = np.uint64(0x9E3779B97F4A7C15)
_STOP_WITHIN = 4  # supervised tokens at the end: templates may write spaces after the stop token


@dataclass(frozen=True)
class Columns:
    """An entry for each example. Hashes have 64 bits."""

    whole: np.ndarray  # uint64, of ids and loss mask
    question: np.ndarray  # uint64
    answer: np.ndarray  # uint64
    begins: np.ndarray  # int32, position of the first token of the answer: the length of the question
    ends: np.ndarray  # int32, the position after the last token of the answer
    targets: np.ndarray  # int32, number of supervised tokens, without the first token, which is never predicted
    has_stop: np.ndarray  # bool, whether the answer ends with a stop token


def mix(values: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit integers (the finalizer of splitmix64, Steele et al. 2014); a bijection."""
    values = values.astype(np.uint64)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def salted(values: np.ndarray, salt: np.ndarray) -> np.ndarray:
    """Hash each value together with a salt, for example its position."""
    return mix(values.astype(np.uint64) + mix(salt) * _ODD)


def read_columns(examples: Examples, progress: Callable[[int], object] = lambda examples: None) -> Columns:
    """Read all examples once.

    Args:
        progress: called with the number of examples done since the last call.
    """
    parts = []
    for block in blocks(examples):
        parts.append(_of_block(block, examples.stop_ids))
        progress(len(block.index))
    if not parts:
        parts.append(_empty())
    return Columns(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _of_block(block: Block, stop_ids: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    position, starts = block.position, block.starts
    supervised = block.weights > 0
    last = np.maximum.reduceat(np.where(supervised, position, -1), starts)
    before = np.repeat(last, block.lengths)
    begins = np.maximum.reduceat(np.where(~supervised & (position < before), position, -1), starts) + 1
    ends = last + 1
    begins = np.minimum(begins, ends)
    first, end = np.repeat(begins, block.lengths), np.repeat(ends, block.lengths)

    def total(hashes: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        return np.add.reduceat(hashes if chosen is None else np.where(chosen, hashes, np.uint64(0)), starts)

    ids = block.ids.astype(np.uint64)
    by_position = salted(ids, position)
    weights = np.ascontiguousarray(block.weights).view(np.uint32).astype(np.uint64) << np.uint64(32)
    is_answer = (position >= first) & (position < end)
    num = np.add.reduceat(supervised & (position > 0), starts, dtype=np.int32)
    stops = np.isin(block.ids, stop_ids) & is_answer & (position >= end - _STOP_WITHIN)
    return (
        total(mix(by_position ^ weights)),
        total(by_position, position < first),
        total(salted(ids, np.where(is_answer, position - first, 0)), is_answer),
        begins.astype(np.int32),
        ends.astype(np.int32),
        num.astype(np.int32),
        np.logical_or.reduceat(stops, starts),
    )


def _empty() -> tuple[np.ndarray, ...]:
    hashes, positions = np.zeros(0, np.uint64), np.zeros(0, np.int32)
    return hashes, hashes, hashes, positions, positions, positions, np.zeros(0, bool)
