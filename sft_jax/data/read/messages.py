"""Messages of a row in the form that chat templates expect, whatever form they come in."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from sft_jax.data.read.flags import FLAGS, refuse_telling, weight_of
from sft_jax.data.read.rows import Message, RowError, shown

# Who speaks, in the words of many data sets, as chat templates call them; in any case of letters.
_ROLES = {
    "user": ("user", "human", "prompter", "customer"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "chatbot", "ai"),
    "system": ("system",),
    "developer": ("developer",),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "tool_result", "tool_output"),
    "function_call": ("function_call", "tool_call"),
}
_ROLE = {name: role for role, names in _ROLES.items() for name in names}
REASONING = ("reasoning_content", "reasoning", "thinking")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class Arguments(dict):
    """The arguments of a call as an object, with the JSON text that the row has them in."""

    text: str | None = None


def read_messages(
    row: Mapping[str, Any], key: str, keep_reasoning: bool, unread: set[str], ignored: Collection[str] = ()
) -> tuple[list[Message], list[float | None]]:
    """The messages in a column, and what each one's loss counts (None: it does not say).

    Args:
        unread: gets the names of what is not read.
        ignored: keys of messages that are left out on purpose.

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
        met = [name for name in ignored if name in given]
        unread.update(f"messages[].{name}, by ignore_columns" for name in met)
        given = {name: one for name, one in given.items() if name not in met}
        try:
            weights.append(weight_of(given))
            messages.append(_canonical(given, keep_reasoning, unread))
        except RowError as error:
            raise RowError(f"message {i}: {error}") from error
    return messages, weights


def _canonical(given: Mapping[str, Any], keep_reasoning: bool, unread: set[str]) -> Message:
    message = {name: value for name, value in given.items() if value is not None and name not in FLAGS}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        role = _ROLE.get(speaker.strip().lower()) if isinstance(speaker, str) else None
        if role is None:
            raise RowError(f"'from' {speaker!r} is none of {', '.join(_ROLE)}")
        message = {"role": role} | message
        if "value" in message:
            message["content"] = message.pop("value")
    role = message.get("role")
    if not isinstance(role, str):
        raise RowError(f"'role' {'is missing' if role is None else f'must be a string, it is {shown(role)}'}")
    message["role"] = role = _ROLE.get(role.strip().lower(), role)
    for name in MEDIA:
        if message.get(name):
            raise RowError(f"has {name!r}; only text can be trained on")
    if role == "function_call":
        calls = read_json(checked(message.pop("content", None), "content"), "the function call")
        message |= {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
    if "function_call" in message:  # OpenAI's older form, of one call
        if "tool_calls" in message:
            raise RowError("'function_call' and 'tool_calls' are both there; keep one")
        call = message.pop("function_call")
        message["tool_calls"] = [read_json(call, "'function_call'") if isinstance(call, str) else call]
    if "tool_calls" in message:
        calls = message.pop("tool_calls")
        calls = read_json(calls, "'tool_calls'") if isinstance(calls, str) else calls
        if not isinstance(calls, list):
            raise RowError(f"'tool_calls' must be a list, it is {shown(calls)}")
        if calls:
            if message["role"] != "assistant":
                raise RowError(f"a message of the {message['role']} has 'tool_calls'; only the assistant calls tools")
            message["tool_calls"] = [_tool_call(call, unread) for call in calls]
    if "content" in message:
        message["content"] = _content(message["content"], unread)
    elif "tool_calls" not in message:
        raise RowError("'content' is null" if "content" in given else "'content' is missing")
    if message["role"] == "assistant":
        _reasoning(message, keep_reasoning)
    for name, value in message.items():
        if isinstance(value, str):
            checked(value, name)
        elif name not in ("content", "tool_calls"):
            refuse_telling(name, value, "the key")
    return message


def _content(value: Any, unread: set[str]) -> str:
    """A string, or the text of its parts."""
    if isinstance(value, list):
        return "".join(_part(part, unread) for part in value)
    return checked(value, "content")


def _part(part: Any, unread: set[str]) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError(f"'content' has a part that is {shown(part)}")
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text"):
        raise RowError(f"'content' has a part of type {kind!r}; only text can be trained on")
    for name in ("text", "value", "content"):
        if part.get(name) is not None:
            unread.update(f"messages[].content[].{other}" for other in _given(part) - {"type", name})
            return checked(part[name], f"content[{name}]")
    raise RowError("'content' has a part without text")


def _reasoning(message: Message, keep: bool) -> None:
    """Check the reasoning of an assistant message, or take it out."""
    for name in REASONING:
        if name in message:
            if not keep:
                del message[name]
            elif not isinstance(message[name], str):
                raise RowError(f"{name!r} must be a string, it is {shown(message[name])}")
    content = message.get("content", "")
    if not keep and content.lstrip().startswith("<think>") and "</think>" in content:
        message["content"] = content.split("</think>", 1)[1].lstrip("\n")


def _tool_call(call: Any, unread: set[str]) -> dict[str, Any]:
    """A call as ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``.

    Arguments become an object: most templates write them with ``tojson``, which would quote a string once more. Their
    text is kept for those that join it to other text.
    """
    if not isinstance(call, dict):
        raise RowError(f"a tool call must be an object, it is {shown(call)}")
    call = {name: value for name, value in call.items() if value is not None}
    is_flat = "function" not in call
    function = {name: call[name] for name in ("name", "arguments") if name in call} if is_flat else call["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("a tool call has no function name")
    unread.update(
        f"messages[].tool_calls[].{name}"
        for name in _given(call) - {"id", "type", *(("name", "arguments") if is_flat else ("function",))}
    )
    unread.update(f"messages[].tool_calls[].function.{name}" for name in _given(function) - {"name", "arguments"})
    given = function.get("arguments")
    parsed = given
    if isinstance(given, str):
        parsed = read_json(given, f"the arguments of {function['name']!r}") if given.strip() else {}
    if not isinstance(parsed, dict | None):
        raise RowError(f"the arguments of {function['name']!r} must be an object, they are {shown(parsed)}")
    arguments = Arguments(parsed or {})
    arguments.text = given if isinstance(given, str) and given.strip() else None
    rest = {name: value for name, value in call.items() if name in ("id", "type")}
    return {"type": "function"} | rest | {"function": {"name": function["name"], "arguments": arguments}}


def read_tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The function schemas of a row, each as ``{"type": "function", "function": {...}}``; None for none.

    They are in ``tools``, or in ``functions`` as OpenAI had it.

    Raises:
        RowError: they are no list of objects, or in both.
    """
    found = {}
    for name in ("tools", "functions"):
        tools = row.get(name)
        if isinstance(tools, str):
            tools = read_json(tools, repr(name)) if tools.strip() else None
        if not tools:
            continue
        if not isinstance(tools, list):
            raise RowError(f"{name!r} must be a list of objects, it is {shown(tools)}")
        tools = [read_json(tool, repr(name)) if isinstance(tool, str) else tool for tool in tools]
        if not all(isinstance(tool, dict) for tool in tools):
            raise RowError(f"{name!r} must be a list of objects, it is {shown(tools)}")
        found[name] = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    if len(found) > 1:
        raise RowError("'tools' and 'functions' both have schemas; leave one out with data.*.ignore_columns")
    return next(iter(found.values()), None)


def read_template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the chat template that a row gives in ``chat_template_kwargs``.

    Raises:
        RowError: they are no object.
    """
    given = row.get("chat_template_kwargs")
    if isinstance(given, str):
        given = read_json(given, "'chat_template_kwargs'") if given.strip() else None
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise RowError(f"'chat_template_kwargs' must be an object, it is {shown(given)}")
    return {name: value for name, value in given.items() if value is not None}


def _given(value: Mapping[str, Any]) -> set[str]:
    return {name for name, one in value.items() if one is not None}


def read_text(row: Mapping[str, Any], key: str) -> str:
    """The string in a column.

    Raises:
        RowError: there is none, or it cannot be written as UTF-8.
    """
    if key not in row:
        raise RowError(f"{key!r} is missing")
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
