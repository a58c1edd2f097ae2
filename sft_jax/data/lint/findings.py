"""What a lint found: one finding for each kind, with the examples that it is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DEFECT, GUESS, FACT = "defect", "guess", "fact"


@dataclass(frozen=True)
class Finding:
    """Examples of one kind.

    Attributes:
        name: as in ``data.leave_out``, unless it is a fact.
        certainty: ``defect``; ``guess``, by a rule that can be wrong; or ``fact``, which may be as it should be.
        examples: int64, ascending; the training examples, or the held-out ones.
        what: what they are, in words.
        advice: what to do.
        note: what to say about one of them; "" for nothing.
        is_held_out: whether ``examples`` are held-out ones.
    """

    name: str
    certainty: str
    examples: np.ndarray
    what: str
    advice: str
    note: Callable[[int], str] = lambda example: ""
    is_held_out: bool = False

    @property
    def count(self) -> int:
        """The number of examples."""
        return len(self.examples)
