"""Parsed rows: a conversation, a document, or tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from sft_jax.errors import one_line

Message = dict[str, Any]


class RowError(ValueError):
    """The reason why a row cannot be used; the caller adds file and row.

    Args:
        line: line number in the file, if the row could not be parsed.
    """

    def __init__(self, reason: str, line: int | None = None):
        super().__init__(reason)
        self.line = line

    def __str__(self) -> str:
        # Not in __init__: this takes longer than parsing a row, and of millions of bad rows few are shown.
        return one_line(super().__str__())

    def at(self, name: str, row: int) -> str:
        """Prefix the reason with its location: ``a.jsonl row 3: …``, or ``a.jsonl:4: …`` if the line has no row."""
        return f"{name} row {row}: {self}" if self.line is None else f"{name}:{self.line}: {self}"


@dataclass(frozen=True)
class Conversation:
    """Messages in the form that chat templates expect, and their loss weights.

    Args:
        messages: each with a ``role``; ``content`` is a string or absent; arguments of tool calls are objects.
        weights: loss weight of each message; None if the row does not specify it, so that ``train_on`` decides.
        tools: tool schemas, or None.
        template_kwargs: chat template arguments of this row.
        unread: unused columns, and unused keys of messages as ``messages[].key``.
        accepted: other texts that an evaluation accepts for the last answer.
    """

    messages: list[Message]
    weights: list[float | None]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()
    accepted: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """The size of all contents as UTF-8."""
        return sum(utf8_size(message.get("content", "")) for message in self.messages)

    @property
    def last_exchange(self) -> tuple[str, str] | None:
        """The last answer and the user message before it, as plain text; None if there is no answer."""
        return next(reversed(self._exchanges()), None)

    def question_before(self, answer: str) -> str | None:
        """Return the user message before the last answer that ``answer`` ends with, or before the last one of all."""
        exchanges = self._exchanges()
        matching = [pair for pair in exchanges if pair[1] and answer.endswith(pair[1])]
        return next((question for question, _ in reversed(matching or exchanges)), None)

    def before(self, answer: str) -> Conversation:
        """Return the messages before the last answer that ``answer`` ends with, or before the last one of all."""
        numbers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        texts = {i: self.messages[i].get("content", "").strip() for i in numbers}
        matching = [i for i in numbers if texts[i] and answer.endswith(texts[i])]
        end = (matching or numbers)[-1]
        return replace(self, messages=self.messages[:end], weights=self.weights[:end])

    def _exchanges(self) -> list[tuple[str, str]]:
        """Return pairs of a user message and its answer, as plain text."""
        question, exchanges = "", []
        for message in self.messages:
            if message["role"] == "user":
                question = message.get("content", "").strip()
            elif message["role"] == "assistant":
                exchanges.append((question, message.get("content", "").strip()))
        return exchanges


@dataclass(frozen=True)
class Document:
    """Plain text. The ``completion`` and the stop token are supervised; with an empty prompt, all tokens are.

    An evaluation accepts the texts in ``accepted`` as well as the completion.
    """

    prompt: str
    completion: str
    unread: frozenset[str] = frozenset()
    accepted: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """The size of prompt and completion as UTF-8."""
        return utf8_size(self.prompt) + utf8_size(self.completion)

    @property
    def last_exchange(self) -> tuple[str, str] | None:
        """Prompt and completion; None if there is no prompt."""
        return (self.prompt.strip(), self.completion.strip()) if self.prompt else None

    def question_before(self, answer: str) -> str | None:
        """Return the prompt; None if it is empty."""
        return self.prompt.strip() or None


@dataclass(frozen=True)
class Tokens:
    """A row that is already tokenized; ``weights[i]`` is the loss weight of predicting ``ids[i]``."""

    ids: list[int]
    weights: list[float] = field(default_factory=list)
    unread: frozenset[str] = frozenset()
    accepted: tuple[str, ...] = ()  # none

    @property
    def num_bytes(self) -> int:
        """The number of tokens, as a measure of the memory that encoding needs."""
        return len(self.ids)

    @property
    def last_exchange(self) -> None:
        """None, because a tokenized row has no separate question."""
        return None

    def question_before(self, answer: str) -> None:
        """Return None, as ``last_exchange`` does."""
        return None


Row = Conversation | Document | Tokens


def shown(value: Any) -> str:
    """Format a value for an error message: its type and its first 40 characters."""
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def utf8_size(text: str) -> int:
    """Return the size of a text as UTF-8; quickly for ASCII."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
