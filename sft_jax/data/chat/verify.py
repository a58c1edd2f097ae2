"""Verifies that supervised turns contain their own messages and no others."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter

from sft_jax.data.chat.template import ChatTemplate, Span
from sft_jax.data.read.messages import REASONING
from sft_jax.data.read.rows import Message, RowError

_THINK = re.compile(r"</?think>")
_PLAIN = {"role", "content", *REASONING}
_MIN_UNIQUE = 16  # a message of at least this many characters does not appear in a text by chance


def verify_turns(
    template: ChatTemplate, text: str, messages: list[Message], turns: dict[int, Span], notes: Counter[str]
) -> tuple[list[tuple[str, Span]], bool]:
    """Verify that each supervised turn contains its own message and no other.

    Returns:
        Role and span of each message that was located, and whether the text surely omits nothing: each message has
        only plain content, long enough not to occur by chance, and all are in order.

    Raises:
        RowError: a supervised turn lacks its own content, or contains that of another message.
    """
    contents: list[tuple[str, Span]] = []
    spans = sorted(turns.values())
    begins = [begin for begin, _ in spans]
    at, is_complete = 0, True
    for i, message in enumerate(messages):
        content = message.get("content", "").strip()
        is_unique = len(content) >= _MIN_UNIQUE and content not in template.source
        is_complete &= message.keys() <= _PLAIN and (i in turns or not content or is_unique)
        if i in turns:
            begin, end = turns[i]
            _verify_turn(message, text[begin:end], i)
            if not content and "tool_calls" not in message:
                notes["supervised answers that are empty"] += 1
            contents.append((message["role"], (begin, end)))
            at = max(at, end)
            continue
        content = _split_content(message)[-1].strip()
        if not content:
            continue
        after = bisect_left(begins, at)
        limit = begins[after] if after < len(begins) else len(text)
        position = text.find(content, at, limit)
        if position >= 0:
            contents.append((message["role"], (position, position + len(content))))
            at = position + len(content)
            continue
        is_complete = False
        outside, rest = [], 0
        for begin, end in spans:
            outside.append(text[rest:begin])
            rest = end
        if any(content in part for part in [*outside, text[rest:]]):
            continue  # the template may move a system message
        if any(content in text[begin:end] for begin, end in spans):
            raise RowError(f"message {i} ({message['role']}): its content appears only inside a supervised answer")
        notes[f"{message['role']} messages that the template does not write verbatim"] += 1
    return contents, is_complete


def _split_content(message: Message) -> list[str]:
    """Split the content of a message at its think tags, since templates may render reasoning separately."""
    content = message.get("content", "")
    return _THINK.split(content) if "think>" in content else [content]


def _verify_turn(message: Message, turn: str, i: int) -> None:
    for part in _split_content(message):
        if part.strip() not in turn:
            raise RowError(f"message {i}: the template does not write its content verbatim, so no mask can be verified")
    for name in REASONING:
        if name in message and message[name].strip() not in turn:
            raise RowError(
                f"message {i}: the template does not write its {name}; set data.reasoning=exclude, or use a template "
                "that does"
            )
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in turn:
            raise RowError(f"message {i}: the template does not write its tool calls; use a template that does")
