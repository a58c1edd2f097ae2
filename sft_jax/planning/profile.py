"""Where a compiled step takes more cycles than its matrix products would at peak, by source line."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from sft_jax.planning.cycles import Estimate, Place
from sft_jax.planning.hlo import arrays_in, num_bytes

SHOWN = 20  # groups in the text
_NAMED = 3  # instructions of a group


def profile(estimate: Estimate) -> list[dict[str, Any]]:
    """Groups the instructions by kind, pass and source line; returns JSON values, the largest above their peak first.

    Cycles are per step. Instructions without a source line are grouped by their operation.
    """
    groups: defaultdict[tuple[str, str, str], list[Place]] = defaultdict(list)
    for place in estimate.places:
        groups[place.kind, place.part, place.source or place.operation].append(place)
    found = [_group(*key, places) for key, places in groups.items()]
    return sorted(found, key=lambda group: -group["above_peak_cycles"])


def _group(kind: str, part: str, source: str, places: list[Place]) -> dict[str, Any]:
    cycles = sum(place.total for place in places)
    at_peak = sum(place.at_peak * place.times for place in places)
    largest = sorted(places, key=lambda place: place.at_peak * place.times - place.total)
    return {
        "kind": kind,
        "pass": part,
        "source": source,
        "cycles": cycles,
        "at_peak_cycles": at_peak,
        "above_peak_cycles": cycles - at_peak,
        "instructions": [
            {
                "name": place.name,
                "operation": place.operation,
                "shape": _largest_array(place.shape),
                "times": place.times,
                "cycles": place.total,
                "at_peak_cycles": place.at_peak * place.times,
            }
            for place in largest
        ],
    }


def profile_text(groups: list[dict[str, Any]]) -> list[str]:
    """Formats the largest groups: a line of figures, and a line of instructions below it."""
    lines = [
        "largest places above their peak, in million cycles per step",
        f"  {'above':>8} {'cycles':>9} {'at peak':>9}  {'kind':12} {'pass':11} source",
    ]
    for group in groups[:SHOWN]:
        above, cycles, at_peak = (
            group[key] / 1e6 for key in ("above_peak_cycles", "cycles", "at_peak_cycles")
        )  # fmt: skip
        lines.append(
            f"  {above:>8,.1f} {cycles:>9,.1f} {at_peak:>9,.1f}  {group['kind']:12} {group['pass']:11} "
            f"{group['source'] or 'unknown'}"
        )
        names = [f"{one['name']} {one['shape']}" for one in group["instructions"]]
        more = "" if len(names) <= _NAMED else f" and {len(names) - _NAMED} more"
        lines.append(f"  {'':44}{', '.join(names[:_NAMED])}{more}")
    return lines


def _largest_array(shape: str) -> str:
    """The largest array of a shape, without its layout.

    >>> _largest_array("(f32[4]{0}, bf16[2,8]{1,0:T(8,128)})")
    'bf16[2,8]'
    """
    dtype, sizes = max(arrays_in(shape), key=num_bytes)
    return f"{dtype}[{','.join(map(str, sizes))}]"
