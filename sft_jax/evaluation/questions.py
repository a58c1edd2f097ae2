"""Turns held-out conversations into questions with a prompt and an expected answer."""

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
    """The last answer of a held-out conversation, and its prompt."""

    prompt_ids: list[int]  # the answer's context, identical to training
    prompt: str  # the same as text
    question: str  # the user message before the answer, or the plain prompt
    answer: str  # text of the supervised tokens after the prompt
    group: str = ""  # the set it belongs to: the label or the path of its source
    others: tuple[str, ...] = ()  # other accepted answers
    where: str = ""  # file and row

    @property
    def accepted(self) -> tuple[str, ...]:
        """All answers that count as right."""
        return (self.answer, *self.others)


def questions(
    examples: Examples,
    sources: Sequence[Source],
    tokenizer: Any,
    limit: int | None = None,
    keep_reasoning: bool = True,
) -> list[Question]:
    """Returns the last supervised answer of each encoded row with its context.

    Skips plain documents, rows of token ids, and rows whose answer was truncated.

    Args:
        sources: the sources of ``examples``.
        limit: maximum number of questions: the same number of each set, spread evenly over its rows.
        keep_reasoning: the value with which ``examples`` were encoded.
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
        asked = [asked[i] for i in _spread([examples.group(i) for i, *_ in asked], limit)]
    result = []
    for i, start, end in asked:
        ids, _ = examples[i]
        row = sources[int(examples.source[i])].row(int(examples.row[i]), keep_reasoning)
        answer = tokenizer.decode(ids[start:end], skip_special_tokens=True).strip()
        if (question := row.question_before(answer)) is not None:
            prompt_ids = ids[:start].tolist()
            group, where = examples.groups[examples.group(i)], examples.describe(i)
            prompt = tokenizer.decode(prompt_ids)
            result.append(Question(prompt_ids, prompt, question, answer, group, row.accepted, where))
    return result


def _spread(groups: Sequence[int], limit: int) -> list[int]:
    """Chooses ``limit`` items: the same number of each group, where there are that many, spread evenly over the group.

    Of the groups ``[0, 0, 0, 0, 0, 1, 2, 2, 2]`` a limit of 5 chooses the items ``[0, 4, 5, 6, 8]``.
    """
    items = [[i for i, one in enumerate(groups) if one == group] for group in dict.fromkeys(groups)]
    chosen: list[int] = []
    for left, of_group in zip(range(len(items), 0, -1), sorted(items, key=len), strict=True):
        num = min(len(of_group), (limit - len(chosen)) // left)  # what a small group leaves goes to larger ones
        chosen += [of_group[i] for i in np.linspace(0, len(of_group) - 1, num).round().astype(int).tolist()]
    return sorted(chosen)


def exchanges(source: Source, keep_reasoning: bool = True) -> Iterator[tuple[str, str]]:
    """Yields the last question and answer of each conversation as plain text."""
    for row in source.read(0, len(source), keep_reasoning):
        if not isinstance(row, RowError) and row.last_exchange is not None:
            yield row.last_exchange


def few_shot_prompts(asked: Sequence[Question], shots: Sequence[tuple[str, str]], num: int, seed: int) -> list[str]:
    """Returns plain-text prompts with ``num`` answered questions before each question, drawn anew for each.

    With the shot ``("2+2?", "4")`` and the question ``3+3?``:
    ``"Question: 2+2?\\nAnswer: 4\\n\\nQuestion: 3+3?\\nAnswer:"``.

    Raises:
        UserError: fewer than ``num`` shots.
    """
    if num > len(shots):
        raise UserError(f"evaluation.shots: {num} answered questions requested, but data.train has {len(shots)}")
    prompts = []
    for i, question in enumerate(asked):
        chosen = np.random.default_rng([seed, i]).choice(len(shots), num, replace=False)
        answered = [f"Question: {shots[j][0]}\nAnswer: {shots[j][1]}" for j in chosen]
        prompts.append("\n\n".join([*answered, f"Question: {question.question}\nAnswer:"]))
    return prompts


def cut_at_blank_line(written: str) -> tuple[str, bool]:
    """Returns the text before the first blank line, which ends a plain-text answer, and whether there is one."""
    answer, separator, _ = written.lstrip().partition("\n\n")
    return answer, bool(separator)


def last_run(mask: np.ndarray) -> tuple[int, int]:
    """Start and end of the last run of ones: ``[0, 1, 1, 0, 1, 1, 0]`` → ``(4, 6)``."""
    ones = np.flatnonzero(mask)
    end = int(ones[-1]) + 1
    zeros = np.flatnonzero(mask[:end] == 0)
    return (int(zeros[-1]) + 1 if len(zeros) else 0), end
