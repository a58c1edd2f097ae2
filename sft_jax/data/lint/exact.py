"""Exact duplicates: examples with the same ids and loss mask."""

from __future__ import annotations

import numpy as np

from sft_jax.data.lint.columns import Columns
from sft_jax.data.tokens.examples import Examples


def first_copies(examples: Examples, columns: Columns) -> np.ndarray:
    """Return the first example with the same ids and mask as each example, int64; itself if there is no earlier one.

    Of the texts ``a b a a``: ``0 1 0 0``.
    """
    order = np.argsort(columns.whole, kind="stable")  # of equal hashes, the first example comes first
    hashes = columns.whole[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = hashes[1:] != hashes[:-1]
    first = np.arange(len(order))
    first[order] = order[np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))]
    for i in np.flatnonzero(first != np.arange(len(first))).tolist():  # hashes may be equal by chance
        ids, mask = examples[i]
        other_ids, other_mask = examples[int(first[i])]
        if not (np.array_equal(ids, other_ids) and np.array_equal(mask, other_mask)):
            first[i] = i
    return first
