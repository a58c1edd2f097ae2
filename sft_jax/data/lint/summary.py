"""Summarizes findings as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sft_jax.config.data import LEAVE_OUT
from sft_jax.data.lint.columns import Columns, read_columns
from sft_jax.data.lint.findings import Finding
from sft_jax.data.lint.leave_out import implied
from sft_jax.data.lint.reading import Reading
from sft_jax.data.lint.rules import RULES, find
from sft_jax.data.tokens.examples import Examples
from sft_jax.data.tokens.prepare import Prepared
from sft_jax.errors import one_line
from sft_jax.redaction import without_secrets

_NUM_SHOWN = 3
_QUESTION, _ANSWER = 56, 64  # characters shown


def summarize_lint(read: Reading, left_out: Sequence[str] = ()) -> dict[str, Any]:
    """Apply all rules.

    Args:
        left_out: the names in ``data.leave_out``.
    """
    findings = find(read)
    found = {finding.name for finding in findings}
    examples = len(read.data.examples)
    held_out = None if read.held_out is None else len(read.held_out.examples)
    not_checked = {} if held_out is not None else {"leaks": "data.eval is empty"}
    return {
        "examples": examples,
        "held_out": held_out,
        "findings": [_as_dict(read, finding, implied(left_out)) for finding in findings],
        "nothing": [name for name in RULES if name not in found and name not in not_checked],
        "not_checked": not_checked,
    }


def _as_dict(read: Reading, finding: Finding, left_out: Sequence[str]) -> dict[str, Any]:
    data = read.held_out if finding.is_held_out else read.data
    assert data is not None
    examples = data.examples
    shown = finding.examples[:_NUM_SHOWN].tolist()
    return {
        "name": finding.name,
        "certainty": finding.certainty,
        "count": finding.count,
        "share": finding.count / len(examples),
        "of": "held-out" if finding.is_held_out else "training",
        "what": finding.what,
        "advice": finding.advice,
        "can_leave_out": finding.name in LEAVE_OUT,
        "is_left_out": finding.name in left_out,
        "shown": [
            {
                "source": examples.names[examples.source[i]],
                "row": int(examples.row[i]),
                "note": finding.note(i),
                "text": _text(data, _columns(read, data, i), i),
            }
            for i in shown
        ],
        "rows": _rows(examples, finding),
    }


def _rows(examples: Examples, finding: Finding) -> dict[str, list[int]]:
    """All rows, by source."""
    sources, rows = examples.source[finding.examples], examples.row[finding.examples]
    found: dict[str, set[int]] = {}
    for index in np.unique(sources).tolist():  # a file may be given twice
        found.setdefault(examples.names[index], set()).update(rows[sources == index].tolist())
    return {name: sorted(numbers) for name, numbers in found.items()}


def _columns(read: Reading, data: Prepared, index: int) -> tuple[int, int]:
    """Where the answer of an example begins and ends."""
    columns: Columns = read.columns
    if data is not read.data:
        columns, index = read_columns(data.examples.take(np.asarray([index]))), 0
    return int(columns.begins[index]), int(columns.ends[index])


def _text(data: Prepared, answer: tuple[int, int], index: int) -> str:
    """The end of the question, and the ⟦answer⟧, on one line and without secrets."""
    begin, end = answer
    ids, _ = data.examples[index]
    question, given = (
        " ".join(without_secrets(data.encoder.tokenizer.decode(part, skip_special_tokens=True)).split())
        for part in (ids[:begin], ids[begin:end])
    )
    if len(question) > _QUESTION:
        question = "…" + question[-_QUESTION:]
    if len(given) > _ANSWER:
        given = f"{given[: _ANSWER // 2]} … {given[-_ANSWER // 2 :]}"
    return one_line(f"{question} ⟦{given}⟧")
