"""Draws charts as SVG that uses the colors of the page's style sheet, for light and dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from sft_jax.report.loss import LossCurves, Points

# Placeholder colors in matplotlib -> CSS variables of the style sheet.
_COLORS = {
    "#010101": "var(--ink)",
    "#020202": "var(--line)",
    "#030303": "var(--base)",
    "#040404": "var(--few-shot)",
    "#050505": "var(--tuned)",
}
_INK, _LINE, BASE, FEW_SHOT, TUNED = _COLORS


def bars(groups: Sequence[str], series: dict[str, tuple[str, list[float | None]]], percent: bool) -> str:
    """Draws a grouped bar chart with the values above the bars.

    Args:
        series: maps a name to (color, one value per group; None draws no bar).
        percent: whether to format values as percentages.
    """
    figure, axes = _figure()
    width = 0.8 / len(series)
    for i, (name, (color, values)) in enumerate(series.items()):
        positions = [group + (i - (len(series) - 1) / 2) * width for group in range(len(groups))]
        shown = [(position, value) for position, value in zip(positions, values, strict=True) if value is not None]
        drawn = axes.bar([p for p, _ in shown], [v for _, v in shown], width * 0.92, color=color, label=name)
        labels = [f"{value:.0%}" if percent else f"{value:.2f}" for _, value in shown]
        axes.bar_label(drawn, labels, fontsize=8, color=_INK, padding=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-max(0.6, 1.6 - 0.6 * len(groups)), len(groups) - 1 + max(0.6, 1.6 - 0.6 * len(groups)))
    if percent:
        axes.set_ylim(0, 1.12)
        axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    else:
        axes.margins(y=0.15)
    return _svg(figure, axes)


def loss_chart(curves: LossCurves) -> str:
    """Draws training loss and held-out loss by step."""
    figure, axes = _figure()
    if curves.train:
        axes.plot(*zip(*curves.train, strict=True), color=BASE, linewidth=0.8, alpha=0.6)
        axes.plot(*zip(*curves.smooth, strict=True), color=BASE, linewidth=1.8, label="training, smoothed")
    if curves.held_out:
        points = zip(*curves.held_out, strict=True)
        axes.plot(*points, color=TUNED, linewidth=1.8, marker="o", markersize=3.5, label="held out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per target token")
    if curves.is_logarithmic:
        axes.set_yscale("log")
    axes.grid(color=_LINE, linewidth=0.6)
    return _svg(figure, axes)


def lines(series: dict[str, Points], label: str, logarithmic: bool = False) -> str:
    """Draws up to three lines by step; the names of several stand above them."""
    figure, axes = _figure()
    for color, (name, line) in zip((TUNED, FEW_SHOT, BASE), series.items(), strict=False):
        marker = "o" if len(line) < 60 else None
        shown = name if len(series) > 1 else None
        axes.plot(*zip(*line, strict=True), color=color, linewidth=1.5, marker=marker, markersize=2.5, label=shown)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.grid(color=_LINE, linewidth=0.6)
    if logarithmic:
        axes.set_yscale("log")
    return _svg(figure, axes)


def histogram(bars: Sequence[tuple[int, int, int]], limit: int, label: str) -> str:
    """Draws a histogram; bars beyond a limit have another color.

    Args:
        bars: first and last value of each bar, and its count.
    """
    figure, axes = _figure()
    width = bars[0][1] - bars[0][0] + 1 if bars else 1
    for name, color, shown in (
        ("", TUNED, [bar for bar in bars if bar[0] <= limit]),
        ("too long", FEW_SHOT, [bar for bar in bars if bar[0] > limit]),
    ):
        if shown:
            edges = [first - 0.5 for first, _, _ in shown]
            axes.bar(edges, [n for *_, n in shown], 0.92 * width, align="edge", color=color, label=name or None)
    axes.set_xlabel(label)
    axes.set_ylabel("examples")
    axes.grid(axis="y", color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    return _svg(figure, axes)


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 2.9), layout="constrained")
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_LINE)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    return figure, axes


def _svg(figure: Any, axes: Any) -> str:
    import matplotlib
    from matplotlib import pyplot

    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    text = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata=no_metadata)
    pyplot.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", svg)
    for placeholder, variable in _COLORS.items():
        svg = svg.replace(placeholder, variable)
    return svg
