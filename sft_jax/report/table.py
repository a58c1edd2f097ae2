"""Formats a comparison as a text table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sft_jax.evaluation.compare import Comparison

# key -> (label, format)
METRICS: dict[str, tuple[str, str]] = {
    "form": ("few-shot prompt", "{}"),
    "exact_match": ("exact match", "{:.1%}"),
    "stop_rate": ("stops by itself", "{:.1%}"),
    "json_rate": ("is JSON", "{:.1%}"),
    "extra_field_rate": ("has extra fields", "{:.1%}"),
    "mean_length": ("mean length (tokens)", "{:.1f}"),
    "loss": ("loss per target token", "{:.3f}"),
    "perplexity": ("perplexity of the answers", "{:.2f}"),
    "token_accuracy": ("token accuracy", "{:.1%}"),
    "stop_probability": ("p(stop) where answers end", "{:.3f}"),
    "document_perplexity": ("perplexity of documents", "{:.2f}"),
    "document_kl": ("KL to the base on documents", "{:.3f}"),
}
_OF_SETS = ("exact_match", "stop_rate", "loss")
_SHOWN_HARDEST = 3
_NAMES = {"base": "base", "few_shot": "base, {shots}-shot", "tuned": "tuned"}


def columns(comparison: Comparison) -> dict[str, str]:
    """Headings of the compared models, in display order."""
    summary = comparison.summary
    return {key: name.format(**summary[key]) for key, name in _NAMES.items() if key in summary}


def rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Rows of a label and one formatted value per column, "–" where it was not measured."""
    lines = []
    for key, (label, form) in METRICS.items():
        values = [comparison.summary[column].get(key) for column in columns(comparison)]
        if any(value is not None for value in values):
            lines.append((label, _shown(values, form)))
    return lines


def _shown(values: Sequence[Any], form: str) -> list[str]:
    return ["–" if value is None else form.format(value) for value in values]


def sections(comparison: Comparison) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Fields of JSON answers, and metrics of each set of held-out data.

    Each section has a heading, and rows as :func:`rows` returns them.
    """
    found = []
    of_fields = {column: comparison.summary[column].get("fields", {}) for column in columns(comparison)}
    if names := dict.fromkeys(name for fields in of_fields.values() for name in fields):
        values = {name: [fields.get(name) for fields in of_fields.values()] for name in names}
        found.append(("right, by field", [(name, _shown(of_name, "{:.1%}")) for name, of_name in values.items()]))
    of_sets = {column: comparison.summary[column].get("sets", {}) for column in columns(comparison)}
    names = dict.fromkeys(name for sets in of_sets.values() for name in sets)
    for key in _OF_SETS:
        label, form = METRICS[key]
        lines = []
        for name in names:
            values = [sets.get(name, {}).get(key) for sets in of_sets.values()]
            num = of_sets["tuned"][name].get("num_targets" if key == "loss" else "num_questions", 0)
            counted = f"{name} ({num:,} {'tokens' if key == 'loss' else 'questions'})"
            lines.append((counted, _shown(values, form)))
        if any(value != "–" for _, values in lines for value in values):
            found.append((f"{label}, by set", lines))
    return found


def as_text(comparison: Comparison, num_samples: int = 4) -> str:
    """Formats sample answers of all models, then the table."""
    lines = []
    chosen = _spread(len(comparison.asked), num_samples) if comparison.answers else []
    for i in chosen:
        question = comparison.asked[i]
        lines += ["", f"  {question.question}   (held out; right: {' or '.join(question.accepted)})"]
        for column, name in columns(comparison).items():
            answer = comparison.answers[column][i]
            text = answer.text if len(answer.text) <= 90 else f"{answer.text[:90]} …"
            ending = "■ stops" if answer.stopped else "… does not stop"
            lines.append(f"    {name:>13}  {text!r} {ending}")
    headings = list(columns(comparison).values())
    width = max(15, *map(len, headings)) + 2
    asked = f"{len(comparison.asked)} held-out questions" if comparison.asked else "held-out text"
    lines += ["", f"  {asked:<28}" + "".join(f"{name:>{width}}" for name in headings)]
    lines += [_row(label, values, width) for label, values in rows(comparison)]
    for title, of_sets in sections(comparison):
        lines += ["", f"  {title}", *(_row(label, values, width) for label, values in of_sets)]
    if comparison.hardest:
        lines += ["", f"  {'training examples with the highest loss':<{28 + width}}{'loss':>8}"]
    for one in comparison.hardest[:_SHOWN_HARDEST]:
        lines.append(
            f"  {_end(f'{one.source} row {one.row}', 26 + width):<{28 + width}}{one.loss:>8.3f}  {one.answer!r:.60}"
        )
    return "\n".join(lines)


def _end(text: str, width: int) -> str:
    return text if len(text) <= width else f"…{text[1 - width :]}"


def _row(label: str, values: Sequence[str], width: int) -> str:
    long = f"  {label}\n" if len(label) > 27 else ""
    return long + f"  {'' if long else label:<28}" + "".join(f"{value:>{width}}" for value in values)


def _spread(total: int, num: int) -> Sequence[int]:
    return sorted({round(i * (total - 1) / max(1, num - 1)) for i in range(min(num, total))})
