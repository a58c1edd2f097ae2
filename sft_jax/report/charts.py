"""Charts as SVG that takes its colours from the page around it, so that one page is right in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from sft_jax.report.loss import LossCurves

# Placeholders matplotlib draws with -> variables of the page's style sheet.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--line)",
    "#030303": "var(--base)",
    "#040404": "var(--few-shot)",
    "#050505": "var(--tuned)",
}
_INK, _LINE, BASE, FEW_SHOT, TUNED = _COLOURS


def bars(groups: Sequence[str], series: dict[str, tuple[str, list[float | None]]], per_cent: bool) -> str:
    """Groups of bars with their figures above.

    Args:
        series: name to (colour, one value a group; None draws no bar).
        per_cent: values are shares.
    """
    figure, axes = _figure()
    width = 0.8 / len(series)
    for i, (name, (colour, values)) in enumerate(series.items()):
        places = [group + (i - (len(series) - 1) / 2) * width for group in range(len(groups))]
        shown = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
        drawn = axes.bar([p for p, _ in shown], [v for _, v in shown], width * 0.92, color=colour, label=name)
        labels = [f"{value:.0%}" if per_cent else f"{value:.2f}" for _, value in shown]
        axes.bar_label(drawn, labels, fontsize=8, color=_INK, padding=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-max(0.6, 1.6 - 0.6 * len(groups)), len(groups) - 1 + max(0.6, 1.6 - 0.6 * len(groups)))
    if per_cent:
        axes.set_ylim(0, 1.12)
        axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    else:
        axes.margins(y=0.15)
    return _svg(figure, axes)


def loss_chart(curves: LossCurves) -> str:
    """Training loss and held-out loss by step."""
    figure, axes = _figure()
    if curves.train:
        axes.plot(*zip(*curves.train, strict=True), color=BASE, linewidth=0.8, alpha=0.6)
        axes.plot(*zip(*curves.smooth, strict=True), color=BASE, linewidth=1.8, label="training, smoothed")
    if curves.held_out:
        points = zip(*curves.held_out, strict=True)
        axes.plot(*points, color=TUNED, linewidth=1.8, marker="o", markersize=3.5, label="held out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per target token")
    axes.grid(color=_LINE, linewidth=0.6)
    return _svg(figure, axes)


def histogram(bars: Sequence[tuple[int, int, int]], limit: int, label: str) -> str:
    """Counts by value; what is beyond a limit stands as one bar of another colour.

    Args:
        bars: first and last value of a bar, and its count.
    """
    figure, axes = _figure()
    width = bars[0][1] - bars[0][0] + 1 if bars else 1
    for name, colour, shown in (
        ("", TUNED, [bar for bar in bars if bar[0] <= limit]),
        ("too long", FEW_SHOT, [bar for bar in bars if bar[0] > limit]),
    ):
        if shown:
            places = [first - 0.5 for first, _, _ in shown]
            axes.bar(places, [n for *_, n in shown], 0.92 * width, align="edge", color=colour, label=name or None)
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
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata=nothing)
    pyplot.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", svg)
    for placeholder, variable in _COLOURS.items():
        svg = svg.replace(placeholder, variable)
    return svg
