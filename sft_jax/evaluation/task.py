"""Reads and encodes the data of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_jax.config import Config
from sft_jax.data.batches.streaming import first_rows
from sft_jax.data.lint.leave_out import leave_out
from sft_jax.data.read.rows import shown
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens.examples import Examples
from sft_jax.data.tokens.prepare import Prepared, prepare_data
from sft_jax.errors import UserError
from sft_jax.evaluation.answers import normalized
from sft_jax.evaluation.few_shot import FewShot, Shot, exchanges, few_shot_of
from sft_jax.evaluation.hardest import candidates
from sft_jax.evaluation.questions import Question, questions
from sft_jax.models.architecture import Architecture


@dataclass(frozen=True)
class Task:
    """The encoded evaluation data."""

    held_out: Examples  # loss on assistant tokens, independent of data.train_on, so that runs are comparable
    asked: list[Question]
    few_shot: FewShot | None
    documents: Examples | None
    hardest: Examples | None  # training examples of which the hardest are listed
    data: list[tuple[str, Prepared]]  # name and prepared data, for the summary
    notes: list[tuple[str, str]]  # choices that are to be said: a name and a text


def prepare(
    config: Config, arch: Architecture, tokenizer: Any, stop_ids: Sequence[int], training: Prepared | None = None
) -> Task:
    """Reads and encodes the evaluation data of a config.

    Args:
        stop_ids: stop token ids of the base model's generation config.
        training: the training data, where they are encoded already.

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
    options, notes = config.evaluation, []
    keeps = held_out.encoder.keep_reasoning
    asked = questions(held_out.examples, held_out.sources, tokenizer, options.num_questions, keeps)
    for question in asked:
        _check(question, options.answer, arch.max_positions)
    if training is None and (options.hardest or (options.shots and config.data.leave_out)):
        sources = first_rows(config.data.train) if config.data.streaming else config.data.train
        training = prepare_data(config.data, sources, tokenizer, stop_ids, arch.max_positions)
        training = leave_out(training, held_out, config.data.leave_out)
    few_shot = None
    if options.shots and asked:
        shots = _shots(config, training, keeps)
        few_shot = few_shot_of(
            asked, shots, options.shots, config.training.seed, held_out, stop_ids, Path(tokenizer.name_or_path)
        )
        notes.append(("few-shot", few_shot.note))
        longest = max(map(len, few_shot.prompts))
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
    hardest = None
    if options.hardest:
        assert training is not None
        hardest = candidates(training.examples)
        notes.append(("hardest", _among(options.hardest, len(hardest), len(training.examples), config.data.streaming)))
    return Task(held_out.examples, asked, few_shot, documents, hardest, data, notes)


def _shots(config: Config, training: Prepared | None, keep_reasoning: bool) -> list[Shot]:
    """The answered questions of the training data, without the rows that ``data.leave_out`` leaves out."""
    if not config.data.leave_out:
        return [pair for source in open_sources(config.data.train) for pair in exchanges(source, keep_reasoning)]
    assert training is not None
    shots: list[Shot] = []
    for i, source in enumerate(training.sources):
        kept = set(training.examples.row[training.examples.source == i].tolist())
        shots += exchanges(source, keep_reasoning, kept)
    return shots


def _check(question: Question, kind: str, max_positions: int) -> None:
    if kind == "json" and any(normalized(one, "json") is None for one in question.accepted):
        raise UserError(
            f"evaluation.answer: json, but the expected answer of {question.where} is not JSON: "
            f"{shown(question.answer)}"
        )
    if len(question.prompt_ids) >= max_positions:
        raise UserError(
            f"data.eval: a prompt of {len(question.prompt_ids)} tokens leaves no room for an answer in the "
            f"{max_positions} positions of the model; lower data.max_length"
        )


def _among(num: int, read: int, total: int, streaming: bool) -> str:
    of = f"{read:,}" if read == total else f"{read:,} of {total:,}, spread evenly,"
    stream = " from the first rows of the stream; later rows are not read" if streaming else ""
    return f"the {min(num, read):,} training examples with the highest loss, among {of} examples{stream}".replace(
        ", examples", " examples"
    )
