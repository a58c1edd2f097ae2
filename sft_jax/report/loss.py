"""Plots the loss curves of a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Points = list[tuple[int, float]]
"""Points of (step, value)."""

_WINDOWS = 50  # in a run: the smoothing follows the run's length
_DRAWN = 1000  # points of a line at most
_DECADE = 10.0  # losses that fall by more than this factor have a logarithmic axis


@dataclass(frozen=True)
class LossCurves:
    """Losses per target token."""

    train: Points
    smooth: Points  # of `train`
    held_out: Points

    @property
    def is_logarithmic(self) -> bool:
        """Whether the losses span more than a decade, so that a linear axis would show only the start."""
        losses = [loss for _, loss in self.smooth + self.held_out]
        return bool(losses) and min(losses) > 0 and max(losses) > _DECADE * min(losses)


def loss_curves(rows: Sequence[dict[str, Any]]) -> LossCurves:
    """Reads the curves from the rows of a ``metrics.jsonl``."""
    train = points(rows, "loss")
    return LossCurves(thinned(train), smoothed(train), points(rows, "eval_loss"))


def points(rows: Sequence[dict[str, Any]], key: str) -> Points:
    """The values of a key by step; rows without it are left out."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def smoothed(line: Points) -> Points:
    """A local linear regression with Gaussian weights (Cleveland 1979), at up to 1,000 places.

    Its window is a fiftieth of the line. Unlike an exponential average, it neither lags behind nor remembers the start,
    and a straight line stays as it is.

    >>> smoothed([(step, 8.0 - step) for step in range(5)])[-1]
    (4, 4.0)
    """
    if len(line) < 3:
        return line
    x = np.arange(len(line), dtype=float)
    y = np.asarray([value for _, value in line], float)
    width = max(1.0, len(line) / _WINDOWS)
    reach = math.ceil(3 * width)
    result = []
    for at in np.unique(np.linspace(0, len(line) - 1, min(len(line), _DRAWN)).round().astype(int)).tolist():
        near = slice(max(0, at - reach), at + reach + 1)
        distance, values = x[near] - at, y[near]
        weights = np.exp(-0.5 * (distance / width) ** 2)
        weights /= weights.sum()
        mean = weights @ distance
        spread = weights @ (distance - mean) ** 2
        slope = (weights * (distance - mean)) @ values / spread
        result.append((line[at][0], float(weights @ values - slope * mean)))
    return result


def thinned(line: Points) -> Points:
    """At most 1,000 points that keep every spike: the lowest and the highest of each part of a long line."""
    if len(line) <= _DRAWN:
        return line
    edges = np.linspace(0, len(line), _DRAWN // 2 + 1).round().astype(int).tolist()
    kept = []
    for start, stop in itertools.pairwise(edges):
        part = line[start:stop]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


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
        measured = zip(*curves.held_out, strict=True)
        axes.plot(*measured, color="tab:orange", marker="o", markersize=4, linewidth=2, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss per target token (nats)", title=run.name)
    axes.grid(alpha=0.3)
    if curves.is_logarithmic:
        axes.set_yscale("log")
    if curves.train or curves.held_out:
        axes.legend(frameon=False)
    path = run / "report" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
