"""Locates the turns of long conversations in linear time.

To render every prefix of a conversation, as :mod:`sft_jax.data.chat.turns` does, takes time that grows with the square
of its length. Here a turn is rendered after the messages shortly before it. With windows that begin at message 32:

    messages 0 … 32 … 38           the text of all messages
    system, 32 … 36                W, ends with turn 36
    system, 32 … 38                W + x, so x must follow turn 36 in the text, and turn 38 ends where x ends
    system, 32 … 37 and prompt     a prefix of W + x, so turn 38 begins where it ends

The first and the last turns, and some in between, are located by their whole prefixes too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sft_jax.data.chat.template import Span
from sft_jax.data.read.rows import RowError

_LONG = 100  # messages of shorter conversations are located by their whole prefixes only
_FIRST = 16  # messages that are located so in any conversation
_WINDOW = 24  # messages
_NUM_CHECKED = 3  # turns between the first and the last that are located so as well


class Prefixes(Protocol):
    """Renders prefixes and parts of one conversation."""

    @property
    def roles(self) -> list[str]:
        """The roles of all messages."""
        ...

    def window(self, numbers: Sequence[int], prompt: bool = False) -> str:
        """Render some of the messages, by their numbers."""
        ...

    def whole(self, i: int, text: str, size: int) -> Span | None:
        """Locate message ``i`` in the text of ``size`` messages by its whole prefix."""
        ...


def find_local(prefixes: Prefixes, supervised: Sequence[int], text: str, size: int) -> dict[int, Span] | None:
    """Locate the supervised messages in the ``text`` of the first ``size`` messages.

    Returns:
        The span of each; None if the conversation is short, or if a message is rendered in another way when others
        precede or follow it, so that only whole prefixes can tell.
    """
    if size <= _LONG:
        return None
    middle = [i for i in supervised if _FIRST <= i < supervised[-1]]
    step = max(1, len(middle) // (_NUM_CHECKED + 1))
    whole = (
        {i for i in supervised if i < _FIRST} | {*middle[step::step][:_NUM_CHECKED]} | {supervised[0], supervised[-1]}
    )
    window = _Window(prefixes, text)
    spans: dict[int, Span] = {}
    before: tuple[int, int] | None = None  # the supervised message before, and where it ends
    for i in supervised:
        span = None if before is None else window.after(i, *before)
        if i in whole:
            by_window, span = span, prefixes.whole(i, text, size)
            if by_window not in (None, span):
                return None
        if span is None:
            return None
        spans[i], before = span, (i, span[1])
    return spans


class _Window:
    """Renders messages after the ones shortly before them."""

    def __init__(self, prefixes: Prefixes, text: str):
        self._prefixes, self._text, self._roles = prefixes, text, prefixes.roles
        self._head = next((i for i, role in enumerate(self._roles) if role not in ("system", "developer")), 0)
        self._begin = -_WINDOW
        self._rendered = ""  # the messages from there to the last one that was located

    def after(self, i: int, before: int, end: int) -> Span | None:
        """Locate message ``i``, given that message ``before`` ends at ``end``; None if the windows cannot tell."""
        try:
            if before - self._begin >= _WINDOW:
                starts = range(before - _WINDOW // 3, self._head - 1, -1)
                self._begin = next((j for j in starts if self._roles[j] == "user"), self._head)
                self._rendered = self._render(before + 1)
            after, prompt = self._render(i + 1), self._render(i, prompt=True)
        except RowError:  # a template may not accept a conversation that begins in the middle
            return None
        more = after[len(self._rendered) :]
        begin = end + len(more) - (len(after) - len(prompt))
        agrees = after.startswith(self._rendered) and after.startswith(prompt) and self._text.startswith(more, end)
        self._rendered = after
        return (begin, end + len(more)) if agrees and begin >= end else None

    def _render(self, stop: int, prompt: bool = False) -> str:
        return self._prefixes.window([*range(self._head), *range(self._begin, stop)], prompt)
