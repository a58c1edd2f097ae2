"""Encoded examples, and counts of what was encoded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Encoded:
    """``mask[i]`` weights the loss of predicting ``ids[i]``: 0 for context, 1 for supervised tokens, or a weight."""

    ids: np.ndarray  # int32
    mask: np.ndarray  # float32


@dataclass
class Tally:
    """Counts over encoded rows. Tallies of disjoint sets of rows can be added."""

    stops: Counter[int] = field(default_factory=Counter)  # the stop token of each supervised turn
    tokens: Counter[str] = field(default_factory=Counter)  # by role; ``template`` for tokens outside all messages
    targets: Counter[str] = field(default_factory=Counter)  # supervised tokens by role
    notes: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)  # unused columns and keys, and in how many rows

    def add(self, other: Tally) -> None:
        """Add another tally to this one."""
        self.stops.update(other.stops)
        self.tokens.update(other.tokens)
        self.targets.update(other.targets)
        self.notes.update(other.notes)
        self.unread.update(other.unread)
