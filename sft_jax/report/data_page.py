"""Writes a self-contained HTML page about the data of a config: statistics and examples with their loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_jax.report import charts, lint_text
from sft_jax.report.data_text import ShownExample
from sft_jax.report.page import render


def write_data_page(
    path: Path, title: str, summary: dict[str, Any], rows: Sequence[ShownExample], lint: dict[str, Any] | None = None
) -> Path:
    """Writes the page, which needs no network and no other file.

    Args:
        summary: the result of :func:`sft_jax.data.batches.summary.summarize`.
        rows: examples to show.
        lint: the result of :func:`sft_jax.data.lint.summary.summarize_lint`, to show that too.
    """
    lengths = summary["lengths"]
    facts = {
        "rows": f"{summary['rows']:,}, of which {summary['kept']:,} are used",
        "tokens": f"{summary['tokens']:,}, of which {summary['targets']:,} are targets",
        "mask": f"train_on {summary['train_on']}, from {summary['mask_from']}",
        "stop token": ", ".join(f"{token} ({count:,} turns)" for token, count in summary["stop_tokens"].items())
        or "none",
    }
    if "packing_efficiency" in summary:
        facts["packing"] = (
            f"{summary['packed_rows']:,} sequences of {summary['max_length']:,} tokens per epoch, "
            f"{summary['packing_efficiency']:.1%} filled"
        )
        facts["steps"] = f"{summary['steps_per_epoch']:,} per epoch, {summary['steps']:,} in total"
    chart = charts.histogram(
        [(one["from"], one["to"], one["count"]) for one in lengths], summary["max_length"], "tokens per example"
    )
    return render(
        path,
        "data.html.jinja",
        title=title,
        facts=facts,
        summary=summary,
        chart=chart,
        shown=rows,
        lint=lint,
        say=lint_text,
    )
