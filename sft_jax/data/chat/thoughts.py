"""Thoughts that a generation prompt opens, or closes, before the model has written a token."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sft_jax.data.read.messages import REASONING
from sft_jax.data.read.rows import Message

# How a thought begins and ends before the answer, in the templates of several families.
_MARKS = (
    (r"<(?P<name>(?:\w+:)?think(?::\w+)?)>", r"</(?:\w+:)?think(?::\w+)?>", "\n</{name}>\n\n"),  # most of them
    (r"<\|channel>thought", r"<channel\|>", "<channel|>"),  # Gemma 4
    (r"\[THINK\]", r"\[/THINK\]", "[/THINK]"),  # Magistral
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>", "<|END_THINKING|>"),  # Command A
    ("◁think▷", "◁/think▷", "◁/think▷"),  # Kimi
)
_INLINE = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True)
class Opening:
    """What the end of a generation prompt does about a thought.

    Args:
        stem: the prompt without it.
        end: what ends the thought that is open; None where the prompt has closed it.
    """

    stem: str
    end: str | None


def openings(prompt: str) -> list[Opening]:
    """A thought that is open, or already closed, at the end of a prompt; at most one."""
    for begin, close, end in _MARKS:
        if found := re.search(rf"{begin}\s*\Z", prompt):
            return [Opening(prompt[: found.start()], end.format(**found.groupdict()))]
        if found := re.search(rf"(?:{begin}\s*)?{close}\s*\Z", prompt):
            return [Opening(prompt[: found.start()], None)]
    return []


def thought_of(message: Message) -> str:
    """What an assistant message has thought, in a key of its own or in front of its content; empty for nothing."""
    for name in REASONING:
        if name in message:
            return message[name]
    inline = _INLINE.match(message.get("content", ""))
    return inline[1] if inline else ""


def with_known_key(message: Message, source: str) -> Message:
    """The message with its thought under the key that a template's source reads, where it reads another one."""
    for name in REASONING:
        if name in message and not _mentions(source, name):
            known = next((other for other in REASONING if other not in message and _mentions(source, other)), None)
            if known is not None:
                return {known if key == name else key: value for key, value in message.items()}
    return message


def _mentions(source: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", source) is not None
