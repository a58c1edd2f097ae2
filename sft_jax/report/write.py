"""Writes the report of an evaluation to a run directory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_jax.adapters.attach import described
from sft_jax.config import Config, SourceConfig
from sft_jax.data.chat.pieces import pieces
from sft_jax.data.read.rows import RowError
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens.prepare import encoder_of
from sft_jax.evaluation.compare import Comparison
from sft_jax.evaluation.metrics import Answered
from sft_jax.report.page import write_page

_SHOWN_ROWS = 4


def write_report(
    config: Config,
    run: Path,
    step: int,
    comparison: Comparison,
    metrics: Sequence[dict[str, Any]],
    tokenizer: Any,
) -> Path:
    """Writes the files of ``run/report``; returns the page's path.

    They are ``summary.json``, ``tuned.json``, ``answers.jsonl``, ``report.html``, and with ``evaluation.hardest``
    ``hardest.jsonl``. ``tuned.json`` has the tuned model's metrics with their step and data, for the model card.

    Args:
        metrics: the rows of ``metrics.jsonl``.
    """
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    _write(folder / "summary.json", json.dumps(comparison.summary, indent=1) + "\n")
    measured_on = [source.path for source in config.data.eval]
    tuned = {"step": step, "data": measured_on, "metrics": comparison.summary["tuned"]}
    _write(folder / "tuned.json", json.dumps(tuned, indent=1) + "\n")
    lines = []
    for i, question in enumerate(comparison.asked):
        row: dict[str, Any] = {"question": question.question, "answer": question.answer}
        if "sets" in comparison.summary["tuned"]:
            row["set"] = question.group
        if question.others:
            row["accepted"] = question.accepted
        row |= {name: _as_dict(answers[i]) for name, answers in comparison.answers.items()}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    _write(folder / "answers.jsonl", "".join(lines))
    if comparison.hardest:
        hard = [{"step": step, **dataclasses.asdict(one)} for one in comparison.hardest]
        kept = [{key: value for key, value in one.items() if key != "shown"} for one in hard]
        _write(folder / "hardest.jsonl", "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in kept))
    title = f"{run.name}: step {step}"
    return write_page(
        folder / "report.html", title, _facts(config, step), comparison, metrics, _masked_examples(config, tokenizer)
    )


def _as_dict(answer: Answered) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(answer).items() if value is not None}


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _facts(config: Config, step: int) -> dict[str, str]:
    lora = config.lora
    method = "full fine-tuning" if lora is None else described(lora)
    optimizer = config.optimizer
    return {
        "base model": config.model.path,
        "tuned": f"{method}; loss on {config.data.train_on} tokens",
        "training data": _names(config.data.train),
        "held out": _names(config.data.eval),
        "documents": _names(config.evaluation.documents) or "none",
        "training": f"{step} steps of {config.training.batch_size} × {config.data.max_length} tokens, "
        f"learning rate {optimizer.learning_rate:g} {optimizer.schedule}, seed {config.training.seed}",
        "answers": f"greedy, at most {config.evaluation.max_new_tokens} tokens, compared as {config.evaluation.answer}",
    }


def _names(sources: Sequence[SourceConfig]) -> str:
    return ", ".join(f"{one.label}: {one.path}" if one.label else one.path for one in sources)


def _masked_examples(config: Config, tokenizer: Any) -> list[list[tuple[str, bool]]]:
    """The first examples of the training data as spans of text with their loss mask."""
    data = config.data
    encoder = encoder_of(data, tokenizer)
    rows = list(open_sources(data.train)[0].read(0, _SHOWN_ROWS, encoder.keep_reasoning))
    shown = [one for row in encoder.encode(rows) if not isinstance(row, RowError) for one in row]
    return [
        pieces(tokenizer, one.ids[: data.max_length].tolist(), (one.mask[: data.max_length] > 0).tolist())
        for one in shown
    ]
