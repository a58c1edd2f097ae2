"""Stacks the layers of a decoder, so that each distinct layer is compiled once and scanned over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

_LONGEST_PERIOD = 12  # layers; longer patterns are not detected


@dataclass(frozen=True)
class Stage:
    """``repeats`` periods of ``period`` layers from layer ``first`` on.

    Layers at the same offset of a period are equal, and their parameters are stacked. The index of the first layer is
    the name of the stack.
    """

    first: int
    period: int
    repeats: int

    @property
    def end(self) -> int:
        """Returns the index after the last layer."""
        return self.first + self.period * self.repeats

    def layers(self, offset: int) -> tuple[int, ...]:
        """Returns the indices of the layers at an offset of the period, in the order of the stack."""
        return tuple(self.first + offset + self.period * i for i in range(self.repeats))


def stages_of(layers: Sequence[Any]) -> tuple[Stage, ...]:
    """Returns the stages with the fewest layers to compile, then the fewest stages, then the longest first stage.

    >>> stages_of("aaaa")
    (Stage(first=0, period=1, repeats=4),)
    >>> stages_of("llgllgl")  # local, local, global
    (Stage(first=0, period=3, repeats=2), Stage(first=6, period=1, repeats=1))
    """
    return _stages_of(tuple(layers))


@cache
def _stages_of(layers: tuple[Any, ...]) -> tuple[Stage, ...]:
    num = len(layers)
    best: list[tuple[int, int, tuple[Stage, ...]]] = [(0, 0, ())] * (num + 1)  # from a layer to the end
    for first in reversed(range(num)):
        candidates = []
        for period in range(1, min(_LONGEST_PERIOD, num - first) + 1):
            end = first + period
            while end <= num:
                rest = best[end]
                stage = Stage(first, period, (end - first) // period)
                candidates.append((rest[0] + period, rest[1] + 1, (stage, *rest[2])))
                if layers[end : end + period] != layers[first : first + period]:
                    break
                end += period
        best[first] = min(candidates, key=lambda one: (*one[:2], -one[2][0].period * one[2][0].repeats))
    return best[0][2]


def stacks_of(layers: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    """Returns the name of each stack and the indices of its layers."""
    return {
        str(stage.first + offset): stage.layers(offset) for stage in stages_of(layers) for offset in range(stage.period)
    }
