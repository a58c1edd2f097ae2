"""The result of one check."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OK, FAILED, NOT_CHECKED = "ok", "FAILED", "not checked"


@dataclass(frozen=True)
class Result:
    """What was checked, and what came out.

    Attributes:
        status: :data:`OK`, :data:`FAILED` or :data:`NOT_CHECKED`.
        details: what was found; for ``NOT_CHECKED`` the reason.
        numbers: the measured values by name, for programs.
    """

    name: str
    status: str
    details: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name:<13}  {self.status:<11}  {self.details}"

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON has it, which knows no NaN: such a number is null."""
        numbers = {name: value if math.isfinite(value) else None for name, value in self.numbers.items()}
        return {"name": self.name, "status": self.status, "details": self.details, **numbers}


def verdict(passed: bool) -> str:
    """The status of something that was checked."""
    return OK if passed else FAILED


def failures(results: Sequence[Result]) -> list[Result]:
    """The results that failed."""
    return [one for one in results if one.status == FAILED]
