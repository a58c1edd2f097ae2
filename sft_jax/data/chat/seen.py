"""Finds the parts of a conversation that a template omits: adds a unique marker to each part and renders it."""

from __future__ import annotations

import json
import re
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
        path: indices and keys of the part, starting with ``messages`` or ``tools``.
        name: for error messages.
        is_required: whether a row is refused if the template omits the part; else the part is reported as unused.
    """

    path: tuple[Any, ...]
    name: str
    is_required: bool = True

    def __str__(self) -> str:
        prefix = f"message {self.path[1]}: " if self.path[0] == "messages" else ""
        return f"{prefix}the template does not write {self.name}"


def list_parts(messages: list[Message], tools: Tools) -> list[Part]:
    """List all parts that a template may omit, except reasoning, which many templates keep for the last answer only."""
    parts = []
    for i, message in enumerate(messages):
        if message.get("content", "").strip():
            parts.append(Part(("messages", i, "content"), f"its content (role {message['role']!r})"))
        for j, call in enumerate(message.get("tool_calls", ())):
            path = ("messages", i, "tool_calls", j, "function", "arguments")
            parts.append(Part(path, f"its call of {call['function']['name']!r} (call {j})"))
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


def find_omitted(
    render: Callable[[list[Message], Tools], str], messages: list[Message], tools: Tools, parts: Iterable[Part]
) -> list[Part]:
    """Return the parts that do not change the rendered text.

    Args:
        render: renders messages and tools as text.
    """
    parts = list(parts)
    marks = {part: f"Zq{n}qZ" for n, part in enumerate(parts)}
    try:
        text = render(*_changed(messages, tools, marks))
        found = set(re.findall(r"(?=(Zq\d+qZ))", text))
        missing = [part for part in parts if marks[part] not in found]
    except RowError:
        missing = parts
    if not missing:
        return []
    plain = render(messages, tools)

    def is_unused(some: list[Part]) -> bool:
        try:
            return render(*_changed(messages, tools, {part: marks[part] for part in some})) == plain
        except RowError:
            return False  # a template that fails because of a marker reads the part

    def unused(some: list[Part]) -> list[Part]:
        if is_unused(some):
            return some
        half = len(some) // 2
        return [*unused(some[:half]), *unused(some[half:])] if half else []

    return unused(missing)


def _changed(messages: list[Message], tools: Tools, marks: dict[Part, str]) -> tuple[list[Message], Tools]:
    changed = {"messages": deepcopy(messages), "tools": deepcopy(tools)}
    for part, mark in marks.items():
        *path, last = part.path
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
    """Parse a text as a JSON object; None if it is not one."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
