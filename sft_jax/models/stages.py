"""How the layers of a decoder are stacked, so that each distinct layer is compiled once and scanned over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

_LONGEST_PERIOD = 12  # layers; longer patterns are not looked for


@dataclass(frozen=True)
class Stage:
    """``repeats`` periods of layers from layer ``first`` on; layer ``first + j`` of a period is like layer ``j``.

    The parameters of the layers at one place of the period are stacked: the stack is called by the number of its first
    layer.
    """

    first: int
    period: int
    repeats: int

    def layers(self, place: int) -> tuple[int, ...]:
        """The numbers of the layers at a place of the period, which are stacked in this order."""
        return tuple(self.first + place + self.period * i for i in range(self.repeats))


def stages_of(layers: Sequence[Any]) -> tuple[Stage, ...]:
    """The stages with the fewest layers to compile, and among those the fewest stages, the first as long as can be.

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
        found = []
        for period in range(1, min(_LONGEST_PERIOD, num - first) + 1):
            end = first + period
            while end <= num:
                rest = best[end]
                stage = Stage(first, period, (end - first) // period)
                found.append((rest[0] + period, rest[1] + 1, (stage, *rest[2])))
                if layers[end : end + period] != layers[first : first + period]:
                    break
                end += period
        best[first] = min(found, key=lambda one: (*one[:2], -one[2][0].period * one[2][0].repeats))
    return best[0][2]


def stacks_of(layers: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    """The name of each stack, and the numbers of its layers."""
    return {
        str(stage.first + place): stage.layers(place) for stage in stages_of(layers) for place in range(stage.period)
    }
