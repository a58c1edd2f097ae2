"""Held-out conversations as questions: what the network is given, what it should write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft_jax.data.examples import Examples
from sft_jax.data.sources import Rows
from sft_jax.errors import UserError


@dataclass(frozen=True)
class Question:
    """One held-out conversation up to its last answer."""

    prompt_ids: list[int]  # exactly the context the answer was trained, or would be trained, in
    prompt: str  # the same as text
    question: str  # the last user message, or the plain prompt
    answer: str


def questions(examples: Examples, rows: Sequence[Rows], tokenizer: Any, limit: int | None = None) -> list[Question]:
    """The questions of encoded rows; plain documents ask nothing and give none.

    Args:
        rows: the sources that ``examples`` were encoded from.
        limit: at most so many, spread evenly over all.
    """
    asked = [i for i in range(len(examples)) if rows[examples.source[i]].format != "text"]
    if limit is not None and len(asked) > limit:
        asked = [asked[i] for i in np.linspace(0, len(asked) - 1, limit).round().astype(int)]
    found = []
    for i in asked:
        ids, mask = examples[i]
        start = last_run(mask)[0]
        question, answer = exchange(rows[examples.source[i]], int(examples.row[i]))
        prompt_ids = ids[:start].tolist()
        found.append(Question(prompt_ids, tokenizer.decode(prompt_ids), question, answer))
    return found


def exchange(source: Rows, row: int) -> tuple[str, str]:
    """The last question and answer of a row, as plain text."""
    fields = source.rows[row]
    if source.format == "messages":
        messages = fields["messages"]
    elif isinstance(fields["prompt"], list):
        messages = fields["prompt"] + fields["completion"]
    else:
        return fields["prompt"].strip(), fields["completion"].strip()
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    asked = [message["content"] for message in messages[:last] if message["role"] == "user"]
    return (asked[-1] if asked else "").strip(), messages[last]["content"].strip()


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
    zeros = np.flatnonzero(~mask[:end])
    return (int(zeros[-1]) + 1 if len(zeros) else 0), end
