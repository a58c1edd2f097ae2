"""What a row says once its format is understood: a conversation, a text to continue, or tokens as they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sft_jax.errors import one_line

Message = dict[str, Any]


class RowError(ValueError):
    """Why one row cannot be trained on; the caller adds file and row.

    Args:
        line: of the file, where the row could not even be read.
    """

    def __init__(self, reason: str, line: int | None = None):
        super().__init__(one_line(reason))
        self.line = line

    def at(self, name: str, row: int) -> str:
        """The reason after where it is: ``a.jsonl row 3: …``, or ``a.jsonl:4: …`` for a line that is no row."""
        return f"{name} row {row}: {self}" if self.line is None else f"{name}:{self.line}: {self}"


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates expect them, and how much each one counts.

    Args:
        messages: with ``role``; ``content`` is a string or absent; tool calls have their arguments as objects.
        weights: of the loss of each message; None where the row says nothing, so that ``train_on`` decides.
        tools: function schemas, or None.
        template_kwargs: arguments of the chat template that this row gives.
        unread: what of the row was not read: columns, and keys of messages as ``messages[].key``.
    """

    messages: list[Message]
    weights: list[float | None]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()

    @property
    def last_exchange(self) -> tuple[str, str] | None:
        """The last user message and the last answer, as plain text; None without an answer."""
        return next(reversed(self._exchanges()), None)

    def question_before(self, answer: str) -> str | None:
        """The user message before the last answer that is this one, or ends it; before the last answer if none is."""
        found = self._exchanges()
        fitting = [pair for pair in found if pair[1] and answer.endswith(pair[1])]
        return next((question for question, _ in reversed(fitting or found)), None)

    def _exchanges(self) -> list[tuple[str, str]]:
        """Each answer after the user message before it, as plain text."""
        asked, found = "", []
        for message in self.messages:
            if message["role"] == "user":
                asked = message.get("content", "").strip()
            elif message["role"] == "assistant":
                found.append((asked, message.get("content", "").strip()))
        return found


@dataclass(frozen=True)
class Document:
    """Plain text: ``completion`` is trained, and with it the stop token; an empty prompt makes it a whole document."""

    prompt: str
    completion: str
    unread: frozenset[str] = frozenset()

    @property
    def last_exchange(self) -> tuple[str, str] | None:
        """Prompt and completion; None for a whole document."""
        return (self.prompt.strip(), self.completion.strip()) if self.prompt else None

    def question_before(self, answer: str) -> str | None:
        """The prompt; None for a whole document."""
        return self.prompt.strip() or None


@dataclass(frozen=True)
class Tokens:
    """A row that was tokenised elsewhere: ``weights[i]`` is what predicting ``ids[i]`` counts."""

    ids: list[int]
    weights: list[float] = field(default_factory=list)
    unread: frozenset[str] = frozenset()

    @property
    def last_exchange(self) -> None:
        """Nothing: text and tokens of a question cannot be told apart."""
        return None

    def question_before(self, answer: str) -> None:
        """Nothing, as above."""
        return None


Row = Conversation | Document | Tokens


def shown(value: Any) -> str:
    """A value for an error message: its type and how it begins."""
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
