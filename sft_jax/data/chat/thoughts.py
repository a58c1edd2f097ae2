"""Reasoning blocks that a generation prompt opens or closes, and reasoning of messages."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sft_jax.data.read.messages import REASONING
from sft_jax.data.read.rows import Message

# Begin, end, and the text that closes a reasoning block, in the templates of several model families.
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
    """A reasoning block at the end of a generation prompt.

    Args:
        stem: the prompt without the block.
        end: the text that closes the open block; None if the prompt already closes it.
    """

    stem: str
    end: str | None


def openings(prompt: str) -> list[Opening]:
    """Find the reasoning block, open or closed, at the end of a prompt; returns at most one."""
    for begin, close, end in _MARKS:
        if found := re.search(rf"{begin}\s*\Z", prompt):
            return [Opening(prompt[: found.start()], end.format(**found.groupdict()))]
        if found := re.search(rf"(?:{begin}\s*)?{close}\s*\Z", prompt):
            return [Opening(prompt[: found.start()], None)]
    return []


def reasoning_of(message: Message) -> str:
    """Return the reasoning of an assistant message, from its own key or the start of its content; may be empty."""
    for name in REASONING:
        if name in message:
            return message[name]
    inline = _INLINE.match(message.get("content", ""))
    return inline[1] if inline else ""


def rename_reasoning_key(message: Message, source: str) -> Message:
    """Rename the reasoning key of a message to the one that the template source mentions, if it mentions another."""
    for name in REASONING:
        if name in message and not _mentions(source, name):
            known = next((other for other in REASONING if other not in message and _mentions(source, other)), None)
            if known is not None:
                return {known if key == name else key: value for key, value in message.items()}
    return message


def _mentions(source: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", source) is not None
