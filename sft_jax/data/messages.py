"""Messages of a row in the form that chat templates expect, whatever form they come in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sft_jax.data.rows import Message, RowError

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "function_call",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
_WEIGHTS = ("train", "weight", "loss_weight")
_REASONING = ("reasoning_content", "reasoning", "thinking")


def read_messages(row: Mapping[str, Any], key: str, keep_reasoning: bool) -> tuple[list[Message], list[float | None]]:
    """The messages in a column, and what each one's loss counts (None: it does not say).

    Raises:
        RowError: something in them cannot be used; the message's number is told.
    """
    value = row.get(key)
    if isinstance(value, str):
        value = read_json(value, key)
    if not isinstance(value, list) or not value:
        raise RowError(f"{key!r} must be a list of messages, it is {shown(value)}")
    messages, weights = [], []
    for i, given in enumerate(value):
        if not isinstance(given, dict):
            raise RowError(f"message {i} must be an object with role and content, it is {shown(given)}")
        try:
            weights.append(_weight(given))
            messages.append(_canonical(given, keep_reasoning))
        except RowError as error:
            raise RowError(f"message {i}: {error}") from error
    return messages, weights


def _canonical(given: Mapping[str, Any], keep_reasoning: bool) -> Message:
    message = {name: value for name, value in given.items() if value is not None and name not in _WEIGHTS}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
        if role is None:
            raise RowError(f"'from' {speaker!r} is none of {', '.join(_ROLES)}")
        message = {"role": role} | message
        if "value" in message:
            message["content"] = message.pop("value")
    role = message.get("role")
    if not isinstance(role, str):
        raise RowError(f"'role' {'is missing' if role is None else f'must be a string, it is {shown(role)}'}")
    if role == "function_call":
        calls = read_json(checked(message.pop("content", None), "value"), "the function call")
        message |= {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
    if "tool_calls" in message:
        calls = message.pop("tool_calls")
        calls = read_json(calls, "'tool_calls'") if isinstance(calls, str) else calls
        if not isinstance(calls, list):
            raise RowError(f"'tool_calls' must be a list, it is {shown(calls)}")
        if calls:
            message["tool_calls"] = [_tool_call(call) for call in calls]
    if "content" in message:
        message["content"] = _content(message["content"])
    elif "tool_calls" not in message:
        raise RowError("'content' is missing")
    if message["role"] == "assistant":
        _reasoning(message, keep_reasoning)
    for name, value in message.items():
        if isinstance(value, str):
            checked(value, name)
    return message


def _content(value: Any) -> str:
    """A string, or the text of its parts."""
    if isinstance(value, list):
        return "".join(_part(part) for part in value)
    return checked(value, "content")


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError(f"'content' has a part that is {shown(part)}")
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text"):
        raise RowError(f"'content' has a part of type {kind!r}; only text can be trained on")
    for name in ("text", "value", "content"):
        if part.get(name) is not None:
            return checked(part[name], f"content[{name}]")
    raise RowError("'content' has a part without text")


def _reasoning(message: Message, keep: bool) -> None:
    """Check the reasoning of an assistant message, or take it out."""
    for name in _REASONING:
        if name in message:
            if not keep:
                del message[name]
            elif not isinstance(message[name], str):
                raise RowError(f"{name!r} must be a string, it is {shown(message[name])}")
    content = message.get("content", "")
    if not keep and content.lstrip().startswith("<think>") and "</think>" in content:
        message["content"] = content.split("</think>", 1)[1].lstrip("\n")


def _tool_call(call: Any) -> dict[str, Any]:
    """A call as ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``.

    Arguments become an object: templates write them with ``tojson``, which would quote a string once more.
    """
    if not isinstance(call, dict):
        raise RowError(f"a tool call must be an object, it is {shown(call)}")
    call = {name: value for name, value in call.items() if value is not None}
    function = call.get("function", {name: call[name] for name in ("name", "arguments") if name in call})
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("a tool call has no function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = read_json(arguments, f"the arguments of {function['name']!r}") if arguments.strip() else {}
    if not isinstance(arguments, dict | None):
        raise RowError(f"the arguments of {function['name']!r} must be an object, they are {shown(arguments)}")
    rest = {name: value for name, value in call.items() if name in ("id", "type")}
    return {"type": "function"} | rest | {"function": {"name": function["name"], "arguments": arguments or {}}}


def read_tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The function schemas of a row, each as ``{"type": "function", "function": {...}}``; None for none.

    Raises:
        RowError: they are no list of objects.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = read_json(tools, "'tools'") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"'tools' must be a list of objects, it is {shown(tools)}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _weight(message: Mapping[str, Any]) -> float | None:
    """What a message's loss counts; None if it does not say."""
    found = {name: message[name] for name in _WEIGHTS if message.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, bool | int | float):
            raise RowError(f"{name!r} must be true, false or a number, it is {shown(value)}")
        if not math.isfinite(value) or value < 0:
            raise RowError(f"{name!r} must be a number that is not negative, it is {value}")
    weights = {float(value) for value in found.values()}
    if len(weights) > 1:
        raise RowError(f"{' and '.join(map(repr, found))} say different things")
    return weights.pop() if weights else None


def read_text(row: Mapping[str, Any], key: str) -> str:
    """The string in a column.

    Raises:
        RowError: there is none, or it cannot be written as UTF-8.
    """
    return checked(row.get(key), key)


def checked(value: Any, name: str) -> str:
    """A string that can be written as UTF-8.

    Raises:
        RowError: it is none.
    """
    if not isinstance(value, str):
        raise RowError(f"{name!r} must be a string, it is {shown(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"{name!r} has half of a character (a lone surrogate) at {error.start}") from error
    return value


def read_json(text: str, what: str) -> Any:
    """What a JSON text says.

    Raises:
        RowError: it is not valid JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is not valid JSON: {str(error)[:80]}") from error


def shown(value: Any) -> str:
    """A value for an error message: its type and how it begins."""
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
