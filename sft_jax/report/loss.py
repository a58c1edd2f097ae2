"""Plots of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_SMOOTHING = 0.9


def plot_loss(run: Path, rows: list[dict[str, Any]]) -> Path:
    """``report/loss.png``: training loss by step, smoothed, with the held-out loss where there is one.

    Args:
        run: the run folder.
        rows: of its ``metrics.jsonl``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if train:
        steps, losses = zip(*train, strict=True)
        smooth, average = [], losses[0]
        for loss in losses:
            average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
            smooth.append(average)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
        axes.plot(steps, smooth, color="tab:blue", linewidth=2, label=f"training (smoothed), ends at {smooth[-1]:.3f}")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        label = f"held out, {losses[0]:.3f} → {losses[-1]:.3f}"
        axes.plot(steps, losses, color="tab:orange", marker="o", markersize=4, linewidth=2, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss per target token (nats)", title=run.name)
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend(frameon=False)
    path = run / "report" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
