"""Held-out conversations as questions: what the network is given, what it should write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft_jax.data.read.rows import RowError
from sft_jax.data.read.sources import Source
from sft_jax.data.tokens.examples import Examples
from sft_jax.errors import UserError


@dataclass(frozen=True)
class Question:
    """One held-out conversation up to its last answer."""

    prompt_ids: list[int]  # exactly the context the answer was trained, or would be trained, in
    prompt: str  # the same as text
    question: str  # the user message before the answer, or the plain prompt
    answer: str  # as text, just what is trained after the prompt


def questions(
    examples: Examples,
    sources: Sequence[Source],
    tokenizer: Any,
    limit: int | None = None,
    keep_reasoning: bool = True,
) -> list[Question]:
    """The questions of encoded rows: the last trained answer of each, after all that stands before it.

    Plain documents and rows of tokens ask nothing and give none; nor does a row that was cut off within its answer.

    Args:
        sources: those that ``examples`` were encoded from.
        limit: at most so many, spread evenly over all.
        keep_reasoning: as the rows were read for ``examples``.
    """
    asks = [source.format not in ("text", "tokens") for source in sources]
    origins = zip(examples.source.tolist(), examples.row.tolist(), strict=True)
    ends = {origin: i for i, origin in enumerate(origins)}
    asked = []
    for (source, _), i in ends.items():  # the last example of each row
        if not asks[source]:
            continue
        ids, mask = examples[i]
        start, end = last_run(mask)
        if np.isin(ids[start:end], examples.stop_ids).any():
            asked.append((i, start, end))
    if limit is not None and len(asked) > limit:
        asked = [asked[i] for i in np.linspace(0, len(asked) - 1, limit).round().astype(int).tolist()]
    found = []
    for i, start, end in asked:
        ids, _ = examples[i]
        row = sources[int(examples.source[i])].row(int(examples.row[i]), keep_reasoning)
        answer = tokenizer.decode(ids[start:end], skip_special_tokens=True).strip()
        if (question := row.question_before(answer)) is not None:
            prompt_ids = ids[:start].tolist()
            found.append(Question(prompt_ids, tokenizer.decode(prompt_ids), question, answer))
    return found


def exchanges(source: Source, keep_reasoning: bool = True) -> Iterator[tuple[str, str]]:
    """The last question and answer of every row that has them, as plain text."""
    for row in source.read(0, len(source), keep_reasoning):
        if not isinstance(row, RowError) and row.last_exchange is not None:
            yield row.last_exchange


def few_shot_prompts(asked: Sequence[Question], shots: Sequence[tuple[str, str]], num: int, seed: int) -> list[str]:
    """Each question after ``num`` answered ones, as plain text; every question draws its own.

    With the shot ``("2+2?", "4")`` and the question ``3+3?``:
    ``"Question: 2+2?\\nAnswer: 4\\n\\nQuestion: 3+3?\\nAnswer:"``.

    Raises:
        UserError: fewer shots are there than asked for.
    """
    if num > len(shots):
        raise UserError(f"evaluation.shots: {num} answered questions are wanted, data.train has {len(shots)}")
    prompts = []
    for i, question in enumerate(asked):
        chosen = np.random.default_rng([seed, i]).choice(len(shots), num, replace=False)
        parts = [f"Question: {shots[j][0]}\nAnswer: {shots[j][1]}" for j in chosen]
        prompts.append("\n\n".join([*parts, f"Question: {question.question}\nAnswer:"]))
    return prompts


def cut_at_blank_line(written: str) -> tuple[str, bool]:
    """What was written before the first blank line, and whether there was one: how an answer in plain text ends."""
    answer, separator, _ = written.lstrip().partition("\n\n")
    return answer, bool(separator)


def last_run(mask: np.ndarray) -> tuple[int, int]:
    """Where the last stretch of ones begins and ends: ``[0, 1, 1, 0, 1, 1, 0]`` → ``(4, 6)``."""
    ones = np.flatnonzero(mask)
    end = int(ones[-1]) + 1
    zeros = np.flatnonzero(mask[:end] == 0)
    return (int(zeros[-1]) + 1 if len(zeros) else 0), end
