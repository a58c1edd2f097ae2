"""Makes few-shot prompts: answered questions of the training data before each held-out question."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.data.chat.encoder import context_ids
from sft_jax.data.chat.forms import adapt_to_template
from sft_jax.data.chat.template import ChatTemplates
from sft_jax.data.chat.template_limits import enforce_limits
from sft_jax.data.read.rows import RowError
from sft_jax.data.read.sources import Source
from sft_jax.data.tokens.prepare import Prepared
from sft_jax.errors import UserError
from sft_jax.evaluation.questions import Question
from sft_jax.hf.tokenizer import has_template

Shot = tuple[str, str]  # question and answer


@dataclass(frozen=True)
class FewShot:
    """A prompt for each question: ``chat`` with the shots as earlier turns, or ``text``, which a blank line ends."""

    form: str
    prompts: list[list[int]]
    note: str  # the form, and why

    def ends(self, text: str, stopped: bool) -> tuple[str, bool]:
        """Returns the answer in a text that a model wrote, and whether it stopped by itself."""
        if self.form == "chat":
            return text, stopped
        answer, at_blank_line = cut_at_blank_line(text)
        return answer, stopped or at_blank_line


def few_shot_of(
    asked: Sequence[Question],
    shots: Sequence[Shot],
    num: int,
    seed: int,
    held_out: Prepared,
    stop_ids: Sequence[int],
    folder: Path,
) -> FewShot:
    """Makes the prompts in the form that the base model knows.

    A base model knows chats if its files have a chat template, and it stops where the template ends a turn. Some base
    models come with a template that they were not trained with; they stop at the end of documents.

    Args:
        shots: answered questions of the training data, of which ``num`` are drawn for each question.
        held_out: the data of ``asked``.
        stop_ids: stop token ids of the base model's generation config.
        folder: the base model.

    Raises:
        UserError: fewer than ``num`` shots, or a template that rejects them.
    """
    encoder = held_out.encoder
    tokenizer = encoder.tokenizer
    drawn = draw(len(asked), shots, num, seed)
    end = next(iter(held_out.examples.stop_ids), None)
    if not has_template(folder):
        why = "the base model has no chat template of its own"
    elif end not in stop_ids:
        why = f"the base model does not stop at {tokenizer.convert_ids_to_tokens(end)!r}, which ends a turn"
    elif any(question.before is None for question in asked):
        why = "held-out prompts are plain text"
    else:
        templates = ChatTemplates.of(tokenizer, encoder.today)
        assert templates is not None
        with enforce_limits():
            chats = [chat_prompt(tokenizer, templates, *pair) for pair in zip(asked, drawn, strict=True)]
        return FewShot("chat", chats, f"{num} answered questions as earlier turns of the chat")
    texts = [text_prompt(question, of_question) for question, of_question in zip(asked, drawn, strict=True)]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    return FewShot("text", prompts, f"{num} answered questions as plain text, because {why}")


def exchanges(source: Source, keep_reasoning: bool = True, rows: Container[int] | None = None) -> Iterator[Shot]:
    """Yields the last question and answer of each conversation as plain text; those of ``rows`` only, if given."""
    for index, row in enumerate(source.read(0, len(source), keep_reasoning)):
        if (rows is None or index in rows) and not isinstance(row, RowError) and row.last_exchange is not None:
            yield row.last_exchange


def draw(num_questions: int, shots: Sequence[Shot], num: int, seed: int) -> list[list[Shot]]:
    """Draws ``num`` shots for each question, anew for each.

    Raises:
        UserError: fewer than ``num`` shots.
    """
    if num > len(shots):
        raise UserError(f"evaluation.shots: {num} answered questions requested, but data.train has {len(shots)}")
    chosen = (np.random.default_rng([seed, i]).choice(len(shots), num, replace=False) for i in range(num_questions))
    return [[shots[j] for j in of_question] for of_question in chosen]


def text_prompt(question: Question, shots: Sequence[Shot]) -> str:
    """Returns a plain-text prompt.

    With the shot ``("2+2?", "4")`` and the question ``3+3?``:
    ``"Question: 2+2?\\nAnswer: 4\\n\\nQuestion: 3+3?\\nAnswer:"``.
    """
    answered = [f"Question: {one}\nAnswer: {answer}" for one, answer in shots]
    return "\n\n".join([*answered, f"Question: {question.question}\nAnswer:"])


def chat_prompt(tokenizer: Any, templates: ChatTemplates, question: Question, shots: Sequence[Shot]) -> list[int]:
    """Returns the ids of a chat: system messages of the question, the shots as turns, and the question's own messages.

    Without shots, these are the ids of the question's own prompt.

    Raises:
        UserError: the template rejects the messages.
    """
    own = question.before
    assert own is not None
    num_system = next((i for i, one in enumerate(own.messages) if one["role"] not in ("system", "developer")), 0)
    turns = [
        {"role": role, "content": text}
        for shot in shots
        for role, text in zip(("user", "assistant"), shot, strict=True)
    ]
    messages = [*own.messages[:num_system], *turns, *own.messages[num_system:]]
    template = templates.choose(has_tools=own.tools is not None)
    try:
        chat = adapt_to_template(template, dataclasses.replace(own, messages=messages, weights=[None] * len(messages)))
        text, _ = template.render(chat.messages, chat.tools, prompt=True, kwargs=chat.template_kwargs)
    except RowError as error:
        raise UserError(f"evaluation.shots: {question.where}: {error}; set evaluation.shots=0") from error
    return context_ids(tokenizer, text, add_special_tokens=False)


def cut_at_blank_line(written: str) -> tuple[str, bool]:
    """Returns the text before the first blank line, which ends a plain-text answer, and whether there is one."""
    answer, separator, _ = written.lstrip().partition("\n\n")
    return answer, bool(separator)
