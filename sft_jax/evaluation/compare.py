"""Compares the base and the tuned model on the same held-out conversations and documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jax.sharding import Mesh

from sft_jax.assembly import Model
from sft_jax.config import Config
from sft_jax.data.tokens.examples import Examples
from sft_jax.evaluation.hardest import HardExample, hardest
from sft_jax.evaluation.likelihood import Scorer, TokenScores
from sft_jax.evaluation.metrics import (
    Answered,
    Metrics,
    answer_metrics,
    answer_sets,
    answered,
    held_out_metrics,
    held_out_sets,
    with_sets,
)
from sft_jax.evaluation.questions import Question
from sft_jax.evaluation.task import Task
from sft_jax.inference.generator import Generated
from sft_jax.progress import Work
from sft_jax.tree import Params


@dataclass(frozen=True)
class Comparison:
    """``summary`` maps ``base``, ``tuned`` and, if requested, ``few_shot`` to their metrics.

    With two or more sets of held-out data, ``sets`` in these maps the name of each set to its metrics.
    """

    summary: dict[str, Metrics]
    asked: list[Question]
    answers: dict[str, list[Answered]]
    hardest: list[HardExample] = field(default_factory=list)


def eval_batch_size(config: Config, mesh: Mesh) -> int:
    """Sequences per evaluation batch: those of a microbatch, or about 4,096 tokens per device."""
    training = config.training
    if training.num_microbatches != "auto":
        return training.batch_size // training.num_microbatches
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return min(training.batch_size, shards * max(1, 4096 // config.data.max_length))


def compare(config: Config, task: Task, model: Model, before: Params) -> Comparison:
    """Evaluates the tuned model and the base model, whose trainable parameters are ``before``; shows a progress bar."""
    options, n = config.evaluation, model
    scorer = Scorer(n.split, config.data.max_length, eval_batch_size(config, n.mesh))
    generator = n.generator
    groups = task.held_out.groups
    summary: dict[str, Metrics] = {}
    answers: dict[str, list[Answered]] = {}

    def write(name: str, params: Params, prompts: Sequence[Sequence[int]]) -> list[Generated]:
        with Work("answering", len(prompts), "questions", f"the {name} model") as work:
            return generator(
                params, n.frozen, prompts, options.max_new_tokens, batch_size=options.batch_size, progress=work.update
            )

    def read(name: str, params: Params, examples: Examples) -> TokenScores:
        with Work("scoring", len(examples), "examples", f"the {name} model") as work:
            return scorer.score(params, n.frozen, examples, work.update)

    for name, params in (("base", before), ("tuned", n.params)):
        held_out = read(name, params, task.held_out)
        metrics = held_out_metrics(task.held_out, held_out, n.stop_ids)
        sets = [held_out_sets(task.held_out, held_out, n.stop_ids)]
        if task.asked:
            written = write(name, params, [question.prompt_ids for question in task.asked])
            texts = [n.tokenizer.decode(one.ids, skip_special_tokens=True) for one in written]
            answers[name] = [
                answered(text, question, options.answer, one.stopped, len(one.ids))
                for text, one, question in zip(texts, written, task.asked, strict=True)
            ]
            metrics |= answer_metrics(answers[name])
            sets.append(answer_sets(task.asked, answers[name], groups))
        if task.documents is not None:
            scores = read(name, params, task.documents)
            metrics["document_perplexity"] = math.exp(-scores.log_prob.mean(dtype=np.float64))
        summary[name] = with_sets(metrics, *sets)
    if task.documents is not None:
        summary["tuned"]["document_kl"] = scorer.divergence(before, n.params, n.frozen, task.documents)
    if task.few_shot is not None:
        answers["few_shot"] = []
        for question, one in zip(task.asked, write("few-shot", before, task.few_shot.prompts), strict=True):
            text, stopped = task.few_shot.ends(n.tokenizer.decode(one.ids, skip_special_tokens=True), one.stopped)
            answers["few_shot"].append(answered(text, question, options.answer, stopped, len(one.ids)))
        metrics = {"shots": options.shots, "form": task.few_shot.form} | answer_metrics(answers["few_shot"])
        summary["few_shot"] = with_sets(metrics, answer_sets(task.asked, answers["few_shot"], groups))
    hard = []
    if task.hardest is not None:
        hard = hardest(task.hardest, read("training data,", n.params, task.hardest), n.tokenizer, options.hardest)
    return Comparison(summary, task.asked, answers, hard)
