"""The compiler's estimate of a step as figures and as text: ``compiled`` in the output of ``plan``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sft_jax.planning.chips import Chip
from sft_jax.planning.cycles import AT_PEAK, KINDS, Estimate, estimate
from sft_jax.planning.hlo import Program
from sft_jax.planning.profile import profile, profile_text


def compiled_figures(
    program: Program | None,
    chip: Chip,
    unknown_trips: Callable[[str], float],
    model_flops: float | None,
    places: bool = False,
) -> dict[str, Any]:
    """Returns the figures of a program as JSON values; ``cycles: None`` and a ``reason`` where there is no estimate.

    Args:
        program: None where there is no text.
        unknown_trips: see :func:`sft_jax.planning.cycles.estimate`.
        model_flops: of a step on one chip, for the bound on MFU; None if unknown.
        places: also the ``profile``, see :func:`sft_jax.planning.profile.profile`.
    """
    if chip.flops_per_cycle is None or chip.clock is None:
        return _none(f"the compiler for {chip.name} writes none, only that of TPUs does")
    if program is None:
        return _none("the compiler wrote no HLO text")
    found = estimate(program, chip, unknown_trips)
    if found is None:
        return _none("the HLO text has none")
    cycles, at_peak = found.cycles, found.at_peak(*AT_PEAK)
    return {
        "cycles": cycles,
        "seconds": cycles / chip.clock,
        "clock_hz": chip.clock,
        "flops_per_cycle": chip.flops_per_cycle,
        "kinds": {kind: _kind(found, kind) for kind in KINDS if found.of_kind(kind)},
        "at_peak_cycles": at_peak,
        "at_peak_share": at_peak / cycles,
        "mfu_bound": None if model_flops is None else model_flops / (cycles * chip.flops_per_cycle),
        "assumed_trips": found.trips,
        "kernel_score_shares": found.kernels,
        "uncounted_kernels": sorted(set(found.uncounted)),
        "unestimated": dict(sorted(found.unestimated.items(), key=lambda one: -one[1])),
    } | ({"profile": profile(found)} if places else {})


def _none(reason: str) -> dict[str, Any]:
    return {"cycles": None, "reason": reason}


def _kind(found: Estimate, kind: str) -> dict[str, float]:
    figures = {"cycles": found.of_kind(kind)}
    return figures | ({"at_peak_cycles": found.at_peak(kind)} if kind in AT_PEAK else {})


def compiled_text(figures: dict[str, Any]) -> list[str]:
    """Formats the figures as lines."""
    if figures["cycles"] is None:
        return [f"compiler's estimate of cycles: none, {figures['reason']}"]
    total = figures["cycles"]
    lines = [f"{'compiler estimate':26} {'million cycles':>16} {'share':>7} {'at peak':>10}"]
    for name, one in sorted(figures["kinds"].items(), key=lambda kind: -kind[1]["cycles"]):
        at_peak = f" {one['at_peak_cycles'] / 1e6:>10,.1f}" if "at_peak_cycles" in one else ""
        lines.append(f"  {name:24} {one['cycles'] / 1e6:>16,.1f} {one['cycles'] / total:>7.1%}{at_peak}")
    bound = "" if figures["mfu_bound"] is None else f"; at most {figures['mfu_bound']:.0%} MFU"
    lines.append(
        f"  {'all':24} {total / 1e6:>16,.1f} {'':7} {figures['at_peak_cycles'] / 1e6:>10,.1f}"
        f" = {figures['at_peak_share']:.0%}"
    )
    waiting = figures.get("waiting_seconds", 0.0)
    network = f"{waiting * 1e3:,.1f} ms of collectives that nothing overlaps" if waiting else "waiting for the network"
    lines.append(
        f"  {figures['seconds'] * 1e3:,.1f} ms at {figures['clock_hz'] / 1e9:.2f} GHz{bound}; without {network}"
    )
    lines += [f"  {note}" for note in _notes(figures)]
    return [*lines, "", *profile_text(figures["profile"])] if "profile" in figures else lines


def _notes(figures: dict[str, Any]) -> list[str]:
    """What the compiler did not estimate and was assumed."""
    notes = []
    if figures["kernel_score_shares"]:
        shares = sorted({share for share in figures["kernel_score_shares"].values() if share < 1}, reverse=True)
        shown = (
            f", {' and '.join(f'{share:.0%}' for share in shares)} of the scores (causal, by blocks)" if shares else ""
        )
        notes.append(f"Pallas kernels carry no estimate: their FLOPs at peak{shown}")
    if figures["uncounted_kernels"]:
        notes.append(f"not counted, FLOPs unknown: {', '.join(figures['uncounted_kernels'])}")
    if total := sum(figures["unestimated"].values()):
        largest = [
            f"{name} {cycles / 1e6:,.1f}" for name, cycles in figures["unestimated"].items() if cycles > total / 20
        ]
        notes.append(
            f"without an estimate: {total / 1e6:,.1f} million cycles by bytes at HBM bandwidth, or products at peak "
            f"({', '.join(largest)})"
        )
    for where, trips in figures["assumed_trips"].items():
        notes.append(f"assumed {trips:,.0f} iterations of the loop at {where}, which depend on the data")
    return notes
