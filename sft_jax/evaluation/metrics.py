"""Metrics of held-out data: of all of it, and of each of its sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft_jax.data.tokens.examples import Examples
from sft_jax.evaluation.answers import grade
from sft_jax.evaluation.json_answers import Fields
from sft_jax.evaluation.likelihood import TokenScores
from sft_jax.evaluation.questions import Question

Metrics = dict[str, Any]  # numbers by name; "sets" maps the name of each set to its metrics


@dataclass(frozen=True)
class Answered:
    """The answer of one model to one question."""

    text: str
    right: bool
    stopped: bool
    num_tokens: int
    fields: Fields | None = None  # of a JSON answer


def answered(text: str, question: Question, kind: str, stopped: bool, num_tokens: int) -> Answered:
    """Compares an answer with all accepted ones; ``kind`` is ``evaluation.answer``."""
    graded = grade(text, question.accepted, kind)
    return Answered(text.strip(), graded.right, stopped, num_tokens, graded.fields)


def held_out_metrics(
    examples: Examples, scores: TokenScores, stop_ids: Sequence[int], group: int | None = None
) -> Metrics:
    """Loss, perplexity and accuracy over all target tokens; mean probability of the stop token at the end of turns.

    Args:
        group: index of a set in ``examples.groups``, whose tokens alone count.
    """
    firsts = np.cumsum(examples.lengths) - examples.lengths
    ids, weights = examples.flat()
    mask, targets = np.delete(weights > 0, firsts), np.delete(ids, firsts)
    if group is not None:
        of_source = np.asarray([examples.groups.index(label) for label in examples.labels])
        mask &= np.repeat(of_source[examples.source] == group, examples.num_tokens)
    if not mask.any():  # a set of which no example is kept
        return {"num_targets": 0}
    ends = mask & np.isin(targets, np.asarray(stop_ids))  # stop tokens occur only at the end of a turn
    loss = -float(scores.log_prob[mask].mean(dtype=np.float64))
    metrics: Metrics = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "token_accuracy": float(scores.correct[mask].mean()),
        "num_targets": int(mask.sum()),
    }
    if ends.any():
        metrics["stop_probability"] = float(np.exp(scores.log_prob[ends], dtype=np.float64).mean())
    return metrics


def answer_metrics(answers: Sequence[Answered]) -> Metrics:
    """Rates over all answers, and their mean length in tokens.

    JSON answers have in ``fields`` the rate of each field, over the questions whose expected answer has it.
    """
    metrics: Metrics = {
        "exact_match": float(np.mean([one.right for one in answers])),
        "stop_rate": float(np.mean([one.stopped for one in answers])),
        "mean_length": float(np.mean([one.num_tokens for one in answers])),
        "num_questions": len(answers),
    }
    compared = [one.fields for one in answers if one.fields is not None]
    if compared:
        metrics["json_rate"] = float(np.mean([one.is_json for one in compared]))
        metrics["extra_field_rate"] = float(np.mean([bool(one.extra) for one in compared]))
        names = dict.fromkeys(name for one in compared for name in one.right)
        metrics["fields"] = {
            name: float(np.mean([one.right[name] for one in compared if name in one.right])) for name in names
        }
    return metrics


def held_out_sets(examples: Examples, scores: TokenScores, stop_ids: Sequence[int]) -> dict[str, Metrics]:
    """The metrics of each set; empty if there are fewer than two sets."""
    groups = examples.groups if len(examples.groups) > 1 else ()
    return {name: held_out_metrics(examples, scores, stop_ids, group) for group, name in enumerate(groups)}


def answer_sets(asked: Sequence[Question], answers: Sequence[Answered], groups: Sequence[str]) -> dict[str, Metrics]:
    """The rates of each set with questions; empty if there are fewer than two sets."""
    result = {}
    for name in groups if len(groups) > 1 else ():
        of_set = [answer for question, answer in zip(asked, answers, strict=True) if question.group == name]
        if of_set:
            result[name] = answer_metrics(of_set)
    return result


def with_sets(metrics: Metrics, *sets: dict[str, Metrics]) -> Metrics:
    """Adds the metrics of each set as ``sets``.

    ``{"loss": 1.0}`` with ``{"math": {"loss": 2.0}}`` and ``{"math": {"exact_match": 0.5}}`` →
    ``{"loss": 1.0, "sets": {"math": {"loss": 2.0, "exact_match": 0.5}}}``.
    """
    joined: dict[str, Metrics] = {}
    for one in sets:
        for name, values in one.items():
            joined[name] = joined.get(name, {}) | values
    return metrics | ({"sets": joined} if joined else {})
