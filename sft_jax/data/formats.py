"""The formats that rows come in, and what each of them says.

==================  ==================================================================================================
``messages``        ``{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}``;
                    also ``tools`` (a list or JSON), and in a message ``tool_calls``, ``name``, ``reasoning_content``
                    or ``thinking``, ``train`` (true or false), ``weight`` or ``loss_weight`` (a number)
``sharegpt``        ``{"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}``;
                    also ``system`` and ``tools``, and turns from ``function_call`` and ``observation``
``alpaca``          ``{"instruction": "Add.", "input": "2+2", "output": "4"}``; also ``system`` and ``history``
``question-answer`` ``{"question": "2+2?", "answer": "4"}``, or ``query`` and ``response``
``prompt-completion``  ``{"prompt": "2+2=", "completion": "4"}``: plain text, or two lists of messages
``text``            ``{"text": "2+2=4"}``: everything is trained
``tokens``          ``{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}``, or ``assistant_masks``: ``[0, 1, 1]``
==================  ==================================================================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from sft_jax.data.rows import Conversation, Document, Message, Row, RowError, Tokens

# In the order they are looked for: each with the columns that tell it.
_TELLING: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("prompt-completion", ("prompt", "completion")),
    ("alpaca", ("instruction", "output")),
    ("question-answer", ("question", "answer")),
    ("question-answer", ("query", "response")),
    ("tokens", ("input_ids", "labels")),
    ("tokens", ("input_ids", "assistant_masks")),
    ("text", ("text",)),
)
FORMATS = tuple(dict.fromkeys(name for name, _ in _TELLING))
# Every column a format reads, which a config may give another name.
COLUMNS = tuple(
    dict.fromkeys([*(c for _, columns in _TELLING for c in columns), "tools", "system", "input", "history"])
)

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
_IGNORED_LABEL = -100


def detect(columns: Collection[str]) -> str | None:
    """The format that a row with these columns has; None if none is known."""
    return next((name for name, needed in _TELLING if set(needed) <= set(columns)), None)


def missing_column(row_format: str, columns: Collection[str]) -> str | None:
    """A column that ``row_format`` needs and that is not there; None if nothing is missing."""
    variants = [needed for name, needed in _TELLING if name == row_format]
    lacking = [[column for column in needed if column not in columns] for needed in variants]
    return min(lacking, key=len)[0] if all(lacking) else None


def parse(row_format: str, row: Mapping[str, Any], keep_reasoning: bool = True) -> Row:
    """What a row says.

    Args:
        row_format: one of :data:`FORMATS`.
        keep_reasoning: keep what an assistant thought before it answered (``reasoning_content``, ``thinking``, or a
            leading ``<think>`` block).

    Raises:
        RowError: something is missing, of the wrong type, or cannot be trained on.
    """
    if row_format == "text":
        return Document("", _text(row, "text"))
    if row_format == "tokens":
        return _tokens(row)
    if row_format == "prompt-completion":
        if not isinstance(row.get("prompt"), list):
            return Document(_text(row, "prompt"), _text(row, "completion"))
        prompt, weights = _messages(row, "prompt", keep_reasoning)
        weights = [weight or 0.0 for weight in weights]  # what is given is not trained, unless it says so itself
        completion, more = _messages(row, "completion", keep_reasoning)
        return Conversation(prompt + completion, [*weights, *more], _tools(row))
    if row_format == "alpaca":
        return _alpaca(row)
    if row_format == "question-answer":
        asked, answered = ("question", "answer") if "question" in row else ("query", "response")
        messages = [*_system(row), _message("user", _text(row, asked)), _message("assistant", _text(row, answered))]
        return Conversation(messages, [None] * len(messages))
    key = "conversations" if row_format == "sharegpt" else "messages"
    messages, weights = _messages(row, key, keep_reasoning)
    system = _system(row) if row_format == "sharegpt" else []
    return Conversation(system + messages, [*(None for _ in system), *weights], _tools(row))


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    messages = _system(row)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise RowError(f"'history' must be a list of [question, answer] pairs, it is {_kind(history)}")
    for asked, answered in history:
        messages += [_message("user", _checked(asked, "history")), _message("assistant", _checked(answered, "history"))]
    instruction = _text(row, "instruction")
    given = "" if row.get("input") is None else _text(row, "input")
    asked = f"{instruction}\n{given}" if given.strip() else instruction
    messages += [_message("user", asked), _message("assistant", _text(row, "output"))]
    return Conversation(messages, [None] * len(messages))


def _messages(row: Mapping[str, Any], key: str, keep_reasoning: bool) -> tuple[list[Message], list[float | None]]:
    """The messages of a row, in the form that templates expect, and their weights."""
    value = row.get(key)
    if isinstance(value, str):
        value = _json(value, key)
    if not isinstance(value, list) or not value:
        raise RowError(f"{key!r} must be a list of messages, it is {_kind(value)}")
    messages, weights = [], []
    for i, given in enumerate(value):
        if not isinstance(given, dict):
            raise RowError(f"message {i} must be an object with role and content, it is {_kind(given)}")
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
        raise RowError(f"'role' {'is missing' if role is None else f'must be a string, it is {_kind(role)}'}")
    if role == "function_call":
        calls = _json(_checked(message.pop("content", None), "value"), "the function call")
        message |= {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
    if "tool_calls" in message:
        calls = message.pop("tool_calls")
        calls = _json(calls, "'tool_calls'") if isinstance(calls, str) else calls
        if not isinstance(calls, list):
            raise RowError(f"'tool_calls' must be a list, it is {_kind(calls)}")
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
            _checked(value, name)
    return message


def _content(value: Any) -> str:
    """A string, or the text of its parts."""
    if isinstance(value, list):
        return "".join(_part(part) for part in value)
    return _checked(value, "content")


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError(f"'content' has a part that is {_kind(part)}")
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text"):
        raise RowError(f"'content' has a part of type {kind!r}; only text can be trained on")
    for name in ("text", "value", "content"):
        if part.get(name) is not None:
            return _checked(part[name], f"content[{name}]")
    raise RowError("'content' has a part without text")


def _reasoning(message: Message, keep: bool) -> None:
    """Check the reasoning of an assistant message, or take it out."""
    for name in _REASONING:
        if name in message:
            if not keep:
                del message[name]
            elif not isinstance(message[name], str):
                raise RowError(f"{name!r} must be a string, it is {_kind(message[name])}")
    content = message.get("content", "")
    if not keep and content.lstrip().startswith("<think>") and "</think>" in content:
        message["content"] = content.split("</think>", 1)[1].lstrip("\n")


def _tool_call(call: Any) -> dict[str, Any]:
    """A call as ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``.

    Arguments become an object: templates write them with ``tojson``, which would quote a string once more.
    """
    if not isinstance(call, dict):
        raise RowError(f"a tool call must be an object, it is {_kind(call)}")
    call = {name: value for name, value in call.items() if value is not None}
    function = call.get("function", {name: call[name] for name in ("name", "arguments") if name in call})
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("a tool call has no function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"the arguments of {function['name']!r}") if arguments.strip() else {}
    if not isinstance(arguments, dict | None):
        raise RowError(f"the arguments of {function['name']!r} must be an object, they are {_kind(arguments)}")
    rest = {name: value for name, value in call.items() if name in ("id", "type")}
    return {"type": "function"} | rest | {"function": {"name": function["name"], "arguments": arguments or {}}}


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The function schemas of a row, each as ``{"type": "function", "function": {...}}``."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "'tools'") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"'tools' must be a list of objects, it is {_kind(tools)}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _system(row: Mapping[str, Any]) -> list[Message]:
    if row.get("system") is None or not _text(row, "system"):
        return []
    return [_message("system", _text(row, "system"))]


def _weight(message: Mapping[str, Any]) -> float | None:
    """What a message's loss counts; None if it does not say."""
    found = {name: message[name] for name in _WEIGHTS if message.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, bool | int | float):
            raise RowError(f"{name!r} must be true, false or a number, it is {_kind(value)}")
        if not math.isfinite(value) or value < 0:
            raise RowError(f"{name!r} must be a number that is not negative, it is {value}")
    weights = {float(value) for value in found.values()}
    if len(weights) > 1:
        raise RowError(f"{' and '.join(map(repr, found))} say different things")
    return weights.pop() if weights else None


def _tokens(row: Mapping[str, Any]) -> Tokens:
    ids = _integers(row, "input_ids")
    if "assistant_masks" in row:
        weights = [float(value) for value in _integers(row, "assistant_masks")]
        if not set(weights) <= {0.0, 1.0}:
            raise RowError("'assistant_masks' must hold 0 and 1 only")
    else:
        labels = _integers(row, "labels")
        wrong = [i for i, (a, b) in enumerate(zip(ids, labels, strict=False)) if b not in (a, _IGNORED_LABEL)]
        if wrong:
            raise RowError(
                f"'labels' differs from 'input_ids' at {wrong[0]}; a label is {_IGNORED_LABEL} or the id at the same "
                "place, it is shifted here and not in the data"
            )
        weights = [float(label != _IGNORED_LABEL) for label in labels]
    if len(weights) != len(ids):
        raise RowError(f"'input_ids' has {len(ids)} tokens, their labels or mask {len(weights)}")
    if row.get("attention_mask") is not None:
        attended = _integers(row, "attention_mask")
        if len(attended) != len(ids):
            raise RowError(f"'input_ids' has {len(ids)} tokens, 'attention_mask' {len(attended)}")
        places = [i for i, one in enumerate(attended) if one]
        if places != list(range(places[0], places[-1] + 1)) if places else True:
            raise RowError("'attention_mask' must be ones, with zeros at the ends only")
        ids, weights = ids[places[0] : places[-1] + 1], weights[places[0] : places[-1] + 1]
    return Tokens(ids, weights)


def _integers(row: Mapping[str, Any], key: str) -> list[int]:
    value = row.get(key)
    value = _json(value, f"{key!r}") if isinstance(value, str) else value
    if not isinstance(value, list) or not value or not all(type(one) is int for one in value):
        raise RowError(f"{key!r} must be a list of integers, it is {_kind(value)}")
    return value


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(row: Mapping[str, Any], key: str) -> str:
    return _checked(row.get(key), key)


def _checked(value: Any, name: str) -> str:
    """A string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise RowError(f"{name!r} must be a string, it is {_kind(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"{name!r} has half of a character (a lone surrogate) at {error.start}") from error
    return value


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is not valid JSON: {str(error)[:80]}") from error


def _kind(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
