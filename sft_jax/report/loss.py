"""Plots the loss curves of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SMOOTHING = 0.9


@dataclass(frozen=True)
class LossCurves:
    """Points of (step, loss per target token)."""

    train: list[tuple[int, float]]
    smooth: list[tuple[int, float]]  # an exponential average of `train`
    held_out: list[tuple[int, float]]


def loss_curves(rows: Sequence[dict[str, Any]]) -> LossCurves:
    """Reads the curves from the rows of a ``metrics.jsonl``."""
    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    smooth: list[tuple[int, float]] = []
    for step, loss in train:
        before = smooth[-1][1] if smooth else loss
        smooth.append((step, _SMOOTHING * before + (1 - _SMOOTHING) * loss))
    held_out = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
    return LossCurves(train, smooth, held_out)


def plot_loss(run: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes ``report/loss.png``: raw and smoothed training loss by step, and the held-out loss if there is one.

    Args:
        run: the run directory.
        rows: the rows of its ``metrics.jsonl``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = loss_curves(rows)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if curves.train:
        axes.plot(*zip(*curves.train, strict=True), color="tab:blue", alpha=0.25, linewidth=1)
        label = f"training (smoothed), ends at {curves.smooth[-1][1]:.3f}"
        axes.plot(*zip(*curves.smooth, strict=True), color="tab:blue", linewidth=2, label=label)
    if curves.held_out:
        label = f"held out, {curves.held_out[0][1]:.3f} → {curves.held_out[-1][1]:.3f}"
        points = zip(*curves.held_out, strict=True)
        axes.plot(*points, color="tab:orange", marker="o", markersize=4, linewidth=2, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss per target token (nats)", title=run.name)
    axes.grid(alpha=0.3)
    if curves.train or curves.held_out:
        axes.legend(frameon=False)
    path = run / "report" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
