"""Renders the page of a run that is still training, from its metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_jax.report import charts
from sft_jax.report.loss import loss_curves, points, smoothed, thinned
from sft_jax.report.page import rendered

_STATUS = "report/status.json"
_RELOAD, _RELOAD_REMOTE = 5, 60  # seconds between two loads
# Charts below the loss: a key of the metrics, its label, and whether its axis is logarithmic.
_CHARTS = (
    ("learning_rate", "learning rate", False),
    ("grad_norm", "gradient norm", True),
    ("real_tokens_per_second", "tokens per second", False),
)


def write_status(run: Path, total_steps: int) -> None:
    """Writes what the metrics do not say: the number of steps of a run."""
    path = run / _STATUS
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"total_steps": total_steps}) + "\n", encoding="utf-8")


def live_page(
    name: str, run: Path, metrics: Sequence[dict[str, Any]], holder: str | None, is_remote: bool = False
) -> str:
    """The page as HTML; it loads itself again every few seconds while the run trains, and needs no script.

    Args:
        name: of the run.
        run: the run directory.
        metrics: the rows of ``metrics.jsonl``.
        holder: the process that trains; None if none does.
        is_remote: whether the run is in a bucket, where nobody can tell if it trains.
    """
    total = _total_steps(run)
    steps = [row for row in metrics if "loss" in row]
    last = steps[-1] if steps else {}
    step = last.get("step", 0)
    is_done = total is not None and step >= total
    state = "training" if holder is not None else "done" if is_done else "in a bucket" if is_remote else "not running"
    return rendered(
        "live.html.jinja",
        title=name,
        state=state,
        holder=holder,
        reload=_RELOAD if holder is not None else _RELOAD_REMOTE if is_remote and not is_done else 0,
        step=step,
        total=total,
        share=0.0 if not total else min(1.0, step / total),
        facts=_facts(steps, metrics, total) if steps else {},
        loss_chart=charts.loss_chart(loss_curves(metrics)) if steps else "",
        charts=[
            (label, charts.lines({label: thinned(line)}, label, is_log))
            for key, label, is_log in _CHARTS
            if len(line := points(metrics, key)) > 1 and (not is_log or min(value for _, value in line) > 0)
        ],
        sources=_last_sources(metrics),
        samples=next((row["samples"] for row in reversed(metrics) if "samples" in row), []),
        sampled_at=next((row["step"] for row in reversed(metrics) if "samples" in row), 0),
        links=[path.name for path in (run / "report" / "report.html", run / "report" / "loss.png") if path.is_file()],
        now=time.strftime("%H:%M:%S"),
    )


def _total_steps(run: Path) -> int | None:
    try:
        return int(json.loads((run / _STATUS).read_text(encoding="utf-8"))["total_steps"])
    except (OSError, ValueError, KeyError, TypeError):  # a run of an earlier version, or one that begins just now
        return None


def _facts(steps: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]], total: int | None) -> dict[str, str]:
    """Label and value of the newest numbers."""
    last = steps[-1]
    facts = {"loss": f"{smoothed(points(steps, 'loss'))[-1][1]:.4f}"}
    if held_out := points(metrics, "eval_loss"):
        lowest = min(held_out, key=lambda point: point[1])
        facts["held-out loss"] = f"{held_out[-1][1]:.4f}, lowest {lowest[1]:.4f} at step {lowest[0]:,}"
    recent = steps[-20:]
    facts["tokens per second"] = f"{sum(row['real_tokens_per_second'] for row in recent) / len(recent):,.0f}"
    facts["learning rate"] = f"{last['learning_rate']:.3g}"
    if total is not None and last["step"] < total:
        seconds = sum(row["step_seconds"] for row in recent) / len(recent) * (total - last["step"])
        facts["time left"] = f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
    return facts


def _last_sources(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The newest training and held-out loss of each source."""
    keys = ("source_loss", "eval_source_loss")
    newest = [next((row[key] for row in reversed(metrics) if key in row), {}) for key in keys]
    names = dict.fromkeys([*newest[0], *newest[1]])
    training, held_out = ({name: f"{loss:.4f}" for name, loss in one.items() if loss is not None} for one in newest)
    return [(name, training.get(name, "–"), held_out.get(name, "–")) for name in names]
