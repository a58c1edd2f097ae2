"""What the rules of the lint read: each part once, when it is first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sft_jax.data.lint.blocks import Block
from sft_jax.data.lint.columns import Columns, read_columns
from sft_jax.data.lint.exact import first_copies
from sft_jax.data.lint.leaks import Leaks, find_leaks
from sft_jax.data.lint.minhash import Pairs, candidates, sign, similar
from sft_jax.data.lint.shingles import Commonness, Side, of_all, of_targets
from sft_jax.data.lint.texts import Texts, read_texts
from sft_jax.data.tokens.prepare import Prepared
from sft_jax.progress import Work


@dataclass(frozen=True)
class Reading:
    """The training data and the held-out data of a config."""

    data: Prepared
    held_out: Prepared | None = None

    @cached_property
    def columns(self) -> Columns:
        """Hashes of the training examples."""
        with Work("lint", len(self.data.examples), "examples") as work:
            return read_columns(self.data.examples, work.update)

    @cached_property
    def first(self) -> np.ndarray:
        """The first exact duplicate of each training example."""
        return first_copies(self.data.examples, self.columns)

    @cached_property
    def common(self) -> Commonness:
        """The shingles of templates."""
        with Work("lint", len(self.data.examples), "examples, counting shingles") as work:
            return Commonness(self.data.examples, work.update)

    @cached_property
    def near(self) -> Pairs:
        """Pairs of near duplicates, without exact ones, and without those of one row."""
        examples = self.data.examples
        side = Side(examples, self.columns)

        def is_rare(columns: Columns, block: Block, hashes: np.ndarray) -> np.ndarray:
            return ~self.common.of(hashes)

        distinct = np.flatnonzero(self.first == np.arange(len(examples)))
        with Work("lint", len(distinct), "distinct examples") as work:
            pairs = candidates(sign(side, distinct, is_rare, work.update))
            i, j = pairs
            same_row = (examples.source[i] == examples.source[j]) & (examples.row[i] == examples.row[j])
            return similar(side, side, pairs[:, ~same_row], (of_all, is_rare, of_targets))

    @cached_property
    def texts(self) -> Texts:
        """What the texts are like."""
        with Work("lint", len(self.data.examples), "texts") as work:
            return read_texts(self.data, self.columns, work.update)

    @cached_property
    def leaks(self) -> Leaks | None:
        """Held-out examples that are in the training data; None without held-out data."""
        if self.held_out is None:
            return None
        train, held_out = self.data.examples, self.held_out.examples
        sides = Side(train, self.columns), Side(held_out, read_columns(held_out))
        with Work("lint", 2 * (len(train) + len(held_out)), "examples with held-out ones") as work:
            return find_leaks(*sides, self.first, self.common, work.update)

    def duplicates(self, gone: np.ndarray, with_near: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find all duplicates but the first ones.

        Args:
            gone: bool, examples that are left out anyway: the first of the others stays.

        Returns:
            The exact duplicates; the near ones; and of each near one, its place in ``near``.
        """
        here = np.flatnonzero(~gone)
        groups, stays, which = np.unique(self.first[here], return_index=True, return_inverse=True)
        exact = here[stays[which] != np.arange(len(here))]
        near: dict[int, int] = {}
        if with_near:
            remains = np.zeros(len(gone), bool)
            remains[groups] = True
            for at, (i, j) in enumerate(zip(self.near.i.tolist(), self.near.j.tolist(), strict=True)):
                if remains[i] and remains[j]:
                    remains[j] = False
                    near[int(here[stays[np.searchsorted(groups, j)]])] = at
        order = sorted(near)
        return exact, np.asarray(order, np.int64), np.asarray([near[one] for one in order], np.int64)
