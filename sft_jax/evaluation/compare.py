"""Compares the base and the tuned model on the same held-out conversations and documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from sft_jax.assembly import Model
from sft_jax.config import Config
from sft_jax.data.read.rows import shown
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens.examples import Examples
from sft_jax.data.tokens.prepare import Prepared, prepare_data
from sft_jax.errors import UserError
from sft_jax.evaluation.answers import normalized
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
from sft_jax.evaluation.questions import Question, cut_at_blank_line, exchanges, few_shot_prompts, questions
from sft_jax.inference.generator import Generated
from sft_jax.models.architecture import Architecture
from sft_jax.tree import Params


@dataclass(frozen=True)
class Task:
    """The encoded evaluation data."""

    held_out: Examples  # loss on assistant tokens, independent of data.train_on, so that runs are comparable
    asked: list[Question]
    few_shot: list[list[int]]  # prompt ids with answered questions before each of `asked`; empty without few-shot
    documents: Examples | None
    data: list[tuple[str, Prepared]]  # name and prepared data, for the summary


@dataclass(frozen=True)
class Comparison:
    """``summary`` maps ``base``, ``tuned`` and, if requested, ``few_shot`` to their metrics.

    With two or more sets of held-out data, ``sets`` in these maps the name of each set to its metrics.
    """

    summary: dict[str, Metrics]
    asked: list[Question]
    answers: dict[str, list[Answered]]


def prepare(config: Config, arch: Architecture, tokenizer: Any, stop_ids: Sequence[int]) -> Task:
    """Reads and encodes the evaluation data of a config.

    Args:
        stop_ids: stop token ids of the base model's generation config.

    Raises:
        UserError: no evaluation data, invalid rows, or a few-shot prompt that exceeds the context.
    """
    if not config.data.eval:
        raise UserError("data.eval: names no source; an evaluation needs held-out conversations")
    train_on = "last_assistant" if config.data.train_on == "last_assistant" else "assistant"
    held_out = prepare_data(
        config.data, config.data.eval, tokenizer, stop_ids, arch.max_positions, train_on, is_held_out=True
    )
    data = [("held out", held_out)]
    options = config.evaluation
    keeps = held_out.encoder.keep_reasoning
    asked = questions(held_out.examples, held_out.sources, tokenizer, options.num_questions, keeps)
    for question in asked:
        if options.answer == "json" and any(normalized(one, "json") is None for one in question.accepted):
            raise UserError(
                f"evaluation.answer: json, but the expected answer of {question.where} is not JSON: "
                f"{shown(question.answer)}"
            )
        if len(question.prompt_ids) >= arch.max_positions:
            raise UserError(
                f"data.eval: a prompt of {len(question.prompt_ids)} tokens leaves no room for an answer in the "
                f"{arch.max_positions} positions of the model; lower data.max_length"
            )
    few_shot = []
    if options.shots and asked:
        shots = [pair for source in open_sources(config.data.train) for pair in exchanges(source, keeps)]
        prompts = few_shot_prompts(asked, shots, options.shots, config.training.seed)
        few_shot = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        longest = max(map(len, few_shot))
        if longest >= arch.max_positions:
            raise UserError(
                f"evaluation.shots: {options.shots} answered questions make a prompt of {longest} tokens, the model "
                f"has {arch.max_positions} positions; use fewer"
            )
    documents = None
    if options.documents:
        read = prepare_data(config.data, options.documents, tokenizer, stop_ids, arch.max_positions, train_on)
        documents = read.examples
        data.append(("documents", read))
    return Task(held_out.examples, asked, few_shot, documents, data)


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
        with _bar(f"{name} answers", len(prompts)) as bar:
            return generator(
                params, n.frozen, prompts, options.max_new_tokens, batch_size=options.batch_size, progress=bar.update
            )

    def read(name: str, params: Params, examples: Examples) -> TokenScores:
        with _bar(f"{name} reads", len(examples)) as bar:
            return scorer.score(params, n.frozen, examples, bar.update)

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
    if task.few_shot:
        answers["few_shot"] = []
        for question, one in zip(task.asked, write("few-shot", before, task.few_shot), strict=True):
            text, ended = cut_at_blank_line(n.tokenizer.decode(one.ids, skip_special_tokens=True))
            stopped = ended or one.stopped
            answers["few_shot"].append(answered(text, question, options.answer, stopped, len(one.ids)))
        metrics = {"shots": options.shots} | answer_metrics(answers["few_shot"])
        summary["few_shot"] = with_sets(metrics, answer_sets(task.asked, answers["few_shot"], groups))
    return Comparison(summary, task.asked, answers)


def _bar(description: str, total: int) -> tqdm:
    return tqdm(desc=description, total=total, leave=False, disable=None)
