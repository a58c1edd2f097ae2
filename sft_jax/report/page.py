"""Writes a self-contained HTML page about a run: metrics, loss curves, answers of both models, and loss masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_jax.evaluation.compare import Comparison
from sft_jax.report import charts, table
from sft_jax.report.loss import loss_curves

_SHARES = ("exact_match", "stop_rate", "token_accuracy")
_COLORS = {"base": charts.BASE, "few_shot": charts.FEW_SHOT, "tuned": charts.TUNED}
_MAX_SAMPLES = 24
_MAX_HARDEST = 24


def write_page(
    path: Path,
    title: str,
    facts: dict[str, str],
    comparison: Comparison,
    metrics: Sequence[dict[str, Any]],
    examples: Sequence[list[tuple[str, bool]]],
) -> Path:
    """Writes the page, which needs no network and no other file.

    Args:
        facts: label and text of the run's settings.
        metrics: the rows of ``metrics.jsonl``.
        examples: training examples as spans of text with their loss mask.
    """
    return render(
        path,
        "page.html.jinja",
        title=title,
        facts=facts,
        columns=table.columns(comparison),
        rows=table.rows(comparison),
        sections=table.sections(comparison),
        share_chart=_shares(comparison),
        loss_chart=charts.loss_chart(loss_curves(metrics)) if metrics else "",
        document_chart=_documents(comparison),
        document_kl=comparison.summary["tuned"].get("document_kl"),
        num_asked=len(comparison.asked),
        samples=_samples(comparison),
        examples=examples,
        hardest=comparison.hardest[:_MAX_HARDEST],
        share=_share,
        few_shot_form=comparison.summary.get("few_shot", {}).get("form"),
    )


def render(path: Path, template: str, **values: Any) -> Path:
    """Renders a template of this folder and writes the page atomically."""
    partial = path.with_suffix(".partial")
    partial.write_text(rendered(template, **values), encoding="utf-8")
    partial.replace(path)
    return path


def rendered(template: str, **values: Any) -> str:
    """Renders a template of this folder."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(values)


def _share(loss: float) -> int:
    """Strength of a token's color in percent: up to 70, so that the text stays readable; 1 - its probability."""
    return round(70 * (1 - math.exp(-max(0.0, loss))))


def _shares(comparison: Comparison) -> str:
    keys = [key for key in _SHARES if any(key in metrics for metrics in comparison.summary.values())]
    series = {
        name: (_COLORS[column], [comparison.summary[column].get(key) for key in keys])
        for column, name in table.columns(comparison).items()
    }
    return charts.bars([table.METRICS[key][0] for key in keys], series, percent=True)


def _documents(comparison: Comparison) -> str:
    values = {column: comparison.summary[column].get("document_perplexity") for column in ("base", "tuned")}
    if None in values.values():
        return ""
    return charts.bars(
        ["perplexity of documents"],
        {column: (_COLORS[column], [value]) for column, value in values.items()},
        percent=False,
    )


def _samples(comparison: Comparison) -> list[dict[str, Any]]:
    """Chooses the answers to show: wrong answers of the tuned model first, then a spread over all."""
    tuned = comparison.answers.get("tuned", [])
    order = sorted(range(len(tuned)), key=lambda i: tuned[i].right)[: _MAX_SAMPLES // 2]
    spread = [round(i * (len(tuned) - 1) / (_MAX_SAMPLES - 1)) for i in range(_MAX_SAMPLES)] if tuned else []
    wrong = [i for i in order if not tuned[i].right]
    chosen = list(dict.fromkeys([*wrong, *spread]))[:_MAX_SAMPLES]
    return [
        {
            "question": comparison.asked[i].question,
            "gold": " or ".join(comparison.asked[i].accepted),
            "answers": {column: comparison.answers[column][i] for column in table.columns(comparison)},
        }
        for i in chosen
    ]
