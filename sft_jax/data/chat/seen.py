"""Which parts of a conversation a template writes: each gets a mark of its own, and the text is searched for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from sft_jax.data.read.messages import REASONING, Arguments
from sft_jax.data.read.rows import Message, RowError

Tools = list[dict[str, Any]] | None
_READ_ELSEWHERE = {"role", "content", "tool_calls", *REASONING}


@dataclass(frozen=True)
class Part:
    """A part of a conversation.

    Args:
        where: numbers and keys that lead to it, from the messages or the tools on.
        name: what to call it, after the number of its message.
        is_needed: a text without it is another conversation; else it is only told that nobody reads it.
    """

    where: tuple[Any, ...]
    name: str
    is_needed: bool = True

    def __str__(self) -> str:
        of_message = f"message {self.where[1]}: " if self.where[0] == "messages" else ""
        return f"{of_message}the template does not write {self.name}"


def parts_of(messages: list[Message], tools: Tools) -> list[Part]:
    """Everything that a template may write or leave out, but thoughts, which many write for the last answer only."""
    parts = []
    for i, message in enumerate(messages):
        if message.get("content", "").strip():
            parts.append(Part(("messages", i, "content"), f"its content (role {message['role']!r})"))
        for j, call in enumerate(message.get("tool_calls", ())):
            where = ("messages", i, "tool_calls", j, "function", "arguments")
            parts.append(Part(where, f"its call of {call['function']['name']!r} (call {j})"))
            if "id" in call:
                parts.append(Part(("messages", i, "tool_calls", j, "id"), "messages[].tool_calls[].id", False))
        for key in message.keys() - _READ_ELSEWHERE:
            parts.append(Part(("messages", i, key), f"messages[].{key}", False))
    for k, tool in enumerate(tools or ()):
        function = tool["function"]
        if not isinstance(function, dict):
            continue
        if isinstance(function.get("name"), str):
            parts.append(Part(("tools", k, "function", "name"), f"the schema of the tool {function['name']!r}"))
        for key in function.keys() - {"name"}:
            if function[key] not in (None, "", [], {}):
                parts.append(Part(("tools", k, "function", key), f"tools[].{key}", False))
    return parts


def unseen(
    render: Callable[[list[Message], Tools], str], messages: list[Message], tools: Tools, parts: Iterable[Part]
) -> list[Part]:
    """The parts that make no difference to a text.

    Args:
        render: the text of messages and tools like these.
    """
    parts = list(parts)
    marks = {part: f"Zq{n}qZ" for n, part in enumerate(parts)}
    try:
        text = render(*_changed(messages, tools, marks))
        missing = [part for part in parts if marks[part] not in text]
    except RowError:
        missing = parts
    if not missing:
        return []
    plain = render(messages, tools)

    def makes_no_difference(some: list[Part]) -> bool:
        try:
            return render(*_changed(messages, tools, {part: marks[part] for part in some})) == plain
        except RowError:
            return False  # it reads what it stumbles over

    if makes_no_difference(missing):
        return missing
    return [part for part in missing if makes_no_difference([part])]


def _changed(messages: list[Message], tools: Tools, marks: dict[Part, str]) -> tuple[list[Message], Tools]:
    changed = {"messages": deepcopy(messages), "tools": deepcopy(tools)}
    for part, mark in marks.items():
        *path, last = part.where
        holder: Any = changed
        for step in path:
            holder = holder[step]
        holder[last] = _marked(holder[last], mark)
    return changed["messages"], changed["tools"]


def _marked(value: Any, mark: str) -> Any:
    if isinstance(value, Arguments):
        return Arguments({**value, mark: mark})
    if isinstance(value, str):
        with_key = _as_object(value)
        return value + mark if with_key is None else json.dumps({**with_key, mark: mark}, ensure_ascii=False)
    if isinstance(value, dict):
        if isinstance(value.get("properties"), dict):  # a JSON schema
            return {**value, "properties": {**value["properties"], mark: {"type": "string", "description": mark}}}
        return {**value, mark: mark}
    if isinstance(value, list):
        return [*value, mark]
    return mark


def _as_object(text: str) -> dict[str, Any] | None:
    """The object that a text is as JSON; None if it is none."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
