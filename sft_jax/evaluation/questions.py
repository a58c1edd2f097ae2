"""Turns held-out conversations into questions with a prompt and an expected answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft_jax.data.read.rows import Conversation
from sft_jax.data.read.sources import Source
from sft_jax.data.tokens.examples import Examples


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
    before: Conversation | None = None  # the messages before the answer; None if the prompt is plain text

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
            before = row.before(answer) if isinstance(row, Conversation) else None
            result.append(Question(prompt_ids, prompt, question, answer, group, row.accepted, where, before))
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


def last_run(mask: np.ndarray) -> tuple[int, int]:
    """Start and end of the last run of ones: ``[0, 1, 1, 0, 1, 1, 0]`` → ``(4, 6)``."""
    ones = np.flatnonzero(mask)
    end = int(ones[-1]) + 1
    zeros = np.flatnonzero(mask[:end] == 0)
    return (int(zeros[-1]) + 1 if len(zeros) else 0), end
