"""Shared parts of tools/claims.py: settings, the Markdown report and its plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from laboratory import Tuned

SEEDS = (0, 1, 2)
SIZES = (4, 8, 16, 32, 64, 128, 256)
SHOTS = (0, 1, 2, 4, 8)
RANKS = (1, 4, 16, 64)


@dataclass(frozen=True)
class Standard:
    """The reference of all comparisons: the base, and networks tuned as in configs/quickstart.yaml, one per seed."""

    base: Tuned
    base_answers: dict[str, float]
    base_perplexity: float  # perplexity of documents
    networks: list[Tuned]
    answers: list[dict[str, float]]


def spread(values: Sequence[float], form: str = "{:.1%}") -> str:
    """Formats the mean and half of the range."""
    values = list(values)
    text = form.format(np.mean(values))
    return f"{text} ± {form.format((max(values) - min(values)) / 2)}" if max(values) > min(values) else text


class Report:
    """Collects Markdown sections: a claim, its table, and whether the figures confirm it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # for plots
        self.lines: list[str] = []

    def section(
        self, claim: str, header: Sequence[str], rows: Sequence[Sequence[str]], holds: bool, comment: str
    ) -> None:
        self.lines += [f"## {claim}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        self.lines += ["| " + " | ".join(row) + " |" for row in rows]
        self.lines += ["", f"**{'Confirmed' if holds else 'Not confirmed'}.** {comment}", ""]


def plot(path: Path, xlabel: str, lines: dict, log: bool = False, labels: Sequence[str] | None = None) -> None:
    """Plots means with their range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for name, points in lines.items():
        x = list(points)
        mean = [np.mean(points[i]) for i in x]
        axes.plot(x, mean, marker="o", label=name)
        axes.fill_between(x, [min(points[i]) for i in x], [max(points[i]) for i in x], alpha=0.2)
    if log:
        axes.set_xscale("symlog", base=2, linthresh=4)
        axes.set_xticks(list(next(iter(lines.values()))), map(str, next(iter(lines.values()))))
    if labels is not None:
        axes.set_xticks(range(len(labels)), labels)
    axes.set(xlabel=xlabel, ylim=(-0.02, 1.02))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
