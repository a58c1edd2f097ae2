"""Converts the messages of a row to the form that chat templates expect."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

from sft_jax.data.read.flags import FLAGS, refuse_unknown_flag, weight_of
from sft_jax.data.read.rows import Message, RowError, shown

# Role names of chat templates, each with the names that datasets use for it, in lower case.
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
    """The arguments of a tool call as an object, with their original JSON text if the row has one."""

    text: str | None = None


def read_messages(
    row: Mapping[str, Any], key: str, keep_reasoning: bool, unread: set[str], ignored: Collection[str] = ()
) -> tuple[list[Message], list[float | None]]:
    """Read the messages in a column, and the loss weight of each (None if not specified).

    Args:
        unread: receives the names of unused keys.
        ignored: keys of messages to ignore.

    Raises:
        RowError: a message cannot be used; the error names its number.
    """
    value = row.get(key)
    if isinstance(value, str):
        value = read_json(value, key)
    if not isinstance(value, list) or not value:
        raise RowError(f"{key!r} must be a list of messages, it is {shown(value)}")
    messages, weights = [], []
    for i, raw in enumerate(value):
        if not isinstance(raw, dict):
            raise RowError(f"message {i} must be an object with role and content, it is {shown(raw)}")
        present = [name for name in ignored if name in raw]
        unread.update(f"messages[].{name}, by ignore_columns" for name in present)
        raw = {name: one for name, one in raw.items() if name not in present}
        try:
            weights.append(weight_of(raw))
            messages.append(_canonical(raw, keep_reasoning, unread))
        except RowError as error:
            raise RowError(f"message {i}: {error}") from error
    return messages, weights


def _known_role(role: str) -> str:
    """The role of chat templates. Other names stay, such as ``user_2``, unless they look misspelled."""
    name = role.strip().lower()
    if name.isalpha() and name not in _ROLE and (close := difflib.get_close_matches(name, _ROLE, n=1, cutoff=0.8)):
        raise RowError(f"role {role!r} is unknown; did you mean {close[0]!r}?")
    return _ROLE.get(name, role)


def _canonical(raw: Mapping[str, Any], keep_reasoning: bool, unread: set[str]) -> Message:
    message = {name: value for name, value in raw.items() if value is not None and name not in FLAGS}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        role = _ROLE.get(speaker.strip().lower()) if isinstance(speaker, str) else None
        if role is None:
            raise RowError(f"'from' {speaker!r} is not one of {', '.join(_ROLE)}")
        message = {"role": role} | message
        if "value" in message:
            message["content"] = message.pop("value")
    role = message.get("role")
    if not isinstance(role, str):
        raise RowError(f"'role' {'is missing' if role is None else f'must be a string, it is {shown(role)}'}")
    message["role"] = role = _known_role(role)
    for name in MEDIA:
        if message.get(name):
            raise RowError(f"has {name!r}; {only_text(name)}")
    if role == "function_call":
        calls = read_json(checked(message.pop("content", None), "content"), "the function call")
        message |= {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
    if "function_call" in message:  # OpenAI's deprecated form of a single call
        if "tool_calls" in message:
            raise RowError("has both 'function_call' and 'tool_calls'; keep one of them")
        call = message.pop("function_call")
        message["tool_calls"] = [read_json(call, "'function_call'") if isinstance(call, str) else call]
    if "tool_calls" in message:
        calls = message.pop("tool_calls")
        calls = read_json(calls, "'tool_calls'") if isinstance(calls, str) else calls
        if not isinstance(calls, list):
            raise RowError(f"'tool_calls' must be a list, it is {shown(calls)}")
        if calls:
            if message["role"] != "assistant":
                raise RowError(f"a {message['role']} message has 'tool_calls'; only assistant messages can call tools")
            message["tool_calls"] = [_tool_call(call, unread) for call in calls]
    if "content" in message:
        message["content"] = _content(message["content"], unread)
    elif "tool_calls" not in message:
        raise RowError("'content' is null" if "content" in raw else "'content' is missing")
    if message["role"] == "assistant":
        _reasoning(message, keep_reasoning)
    for name, value in message.items():
        if isinstance(value, str):
            checked(value, name)
        elif name not in ("content", "tool_calls"):
            refuse_unknown_flag(name, value, "the key")
    return message


def only_text(column: str | None = None) -> str:
    """The reason why media are refused, and what to do.

    Args:
        column: the column or key of a message that can be ignored; None for a part of the content.
    """
    ignored = "" if column is None else f", ignore it with data.*.ignore_columns: [{column}]"
    return f"only text is supported; remove it{ignored}, or leave such rows out with data.on_bad_row: skip"


def _content(value: Any, unread: set[str]) -> str:
    """Return the content as a string; joins the text of its parts."""
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
        raise RowError(f"'content' has a part of type {kind!r}; {only_text()}")
    for name in MEDIA:
        if part.get(name):
            raise RowError(f"'content' has a part with {name!r}; {only_text()}")
    for name in ("text", "value", "content"):
        if part.get(name) is not None:
            unread.update(f"messages[].content[].{other}" for other in _non_null_keys(part) - {"type", name})
            return checked(part[name], f"content[{name}]")
    raise RowError("'content' has a part without text")


def _reasoning(message: Message, keep: bool) -> None:
    """Check the reasoning of an assistant message, or remove it."""
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
    """Convert a tool call to ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``.

    Arguments become an object, because most templates render them with ``tojson``, which would quote a string again.
    Their JSON text is kept for templates that concatenate it.
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
        for name in _non_null_keys(call) - {"id", "type", *(("name", "arguments") if is_flat else ("function",))}
    )
    unused = _non_null_keys(function) - {"name", "arguments"}
    unread.update(f"messages[].tool_calls[].function.{name}" for name in unused)
    raw = function.get("arguments")
    parsed = raw
    if isinstance(raw, str):
        parsed = read_json(raw, f"the arguments of {function['name']!r}") if raw.strip() else {}
    if not isinstance(parsed, dict | None):
        raise RowError(f"the arguments of {function['name']!r} must be an object, they are {shown(parsed)}")
    arguments = Arguments(parsed or {})
    arguments.text = raw if isinstance(raw, str) and raw.strip() else None
    rest = {name: value for name, value in call.items() if name in ("id", "type")}
    return {"type": "function"} | rest | {"function": {"name": function["name"], "arguments": arguments}}


def read_tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Read the tool schemas of a row, each as ``{"type": "function", "function": {...}}``; None if there are none.

    Reads ``tools``, or ``functions``, the deprecated name of OpenAI.

    Raises:
        RowError: a column is not a list of objects, or both columns are present.
    """
    schemas = {}
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
        schemas[name] = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    if len(schemas) > 1:
        raise RowError("'tools' and 'functions' both have schemas; ignore one of them with data.*.ignore_columns")
    return next(iter(schemas.values()), None)


def read_template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read the chat template arguments of a row from ``chat_template_kwargs``.

    Raises:
        RowError: they are not an object.
    """
    kwargs = row.get("chat_template_kwargs")
    if isinstance(kwargs, str):
        kwargs = read_json(kwargs, "'chat_template_kwargs'") if kwargs.strip() else None
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict):
        raise RowError(f"'chat_template_kwargs' must be an object, it is {shown(kwargs)}")
    return {name: value for name, value in kwargs.items() if value is not None}


def _non_null_keys(value: Mapping[str, Any]) -> set[str]:
    return {name for name, one in value.items() if one is not None}


def read_text(row: Mapping[str, Any], key: str) -> str:
    """Read the string in a column.

    Raises:
        RowError: the column is missing, not a string, or cannot be encoded as UTF-8.
    """
    if key not in row:
        raise RowError(f"{key!r} is missing")
    return checked(row.get(key), key)


def checked(value: Any, name: str) -> str:
    """Check that a value is a string that can be encoded as UTF-8, and return it.

    Raises:
        RowError: it is not.
    """
    if not isinstance(value, str):
        raise RowError(f"{name!r} must be a string, it is {shown(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"{name!r} has a lone surrogate at character {error.start}, invalid text") from error
    return value


def read_json(text: str, what: str) -> Any:
    """Parse a JSON text.

    Raises:
        RowError: it is not valid JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is not valid JSON: {str(error)[:80]}") from error
