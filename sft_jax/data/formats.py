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

from collections.abc import Collection, Mapping
from typing import Any

from sft_jax.data.messages import checked, read_json, read_messages, read_text, read_tools, shown
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
        return Document("", read_text(row, "text"))
    if row_format == "tokens":
        return _tokens(row)
    if row_format == "prompt-completion":
        if not isinstance(row.get("prompt"), list):
            return Document(read_text(row, "prompt"), read_text(row, "completion"))
        prompt, weights = read_messages(row, "prompt", keep_reasoning)
        weights = [weight or 0.0 for weight in weights]  # what is given is not trained, unless it says so itself
        completion, more = read_messages(row, "completion", keep_reasoning)
        return Conversation(prompt + completion, [*weights, *more], read_tools(row))
    if row_format == "alpaca":
        return _alpaca(row)
    if row_format == "question-answer":
        asked, answered = ("question", "answer") if "question" in row else ("query", "response")
        messages = [
            *_system(row),
            _message("user", read_text(row, asked)),
            _message("assistant", read_text(row, answered)),
        ]
        return Conversation(messages, [None] * len(messages))
    key = "conversations" if row_format == "sharegpt" else "messages"
    messages, weights = read_messages(row, key, keep_reasoning)
    system = _system(row) if row_format == "sharegpt" else []
    return Conversation(system + messages, [*(None for _ in system), *weights], read_tools(row))


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    messages = _system(row)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise RowError(f"'history' must be a list of [question, answer] pairs, it is {shown(history)}")
    for asked, answered in history:
        messages += [_message("user", checked(asked, "history")), _message("assistant", checked(answered, "history"))]
    instruction = read_text(row, "instruction")
    given = "" if row.get("input") is None else read_text(row, "input")
    asked = f"{instruction}\n{given}" if given.strip() else instruction
    messages += [_message("user", asked), _message("assistant", read_text(row, "output"))]
    return Conversation(messages, [None] * len(messages))


def _system(row: Mapping[str, Any]) -> list[Message]:
    if row.get("system") is None or not read_text(row, "system"):
        return []
    return [_message("system", read_text(row, "system"))]


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
    value = read_json(value, f"{key!r}") if isinstance(value, str) else value
    if not isinstance(value, list) or not value or not all(type(one) is int for one in value):
        raise RowError(f"{key!r} must be a list of integers, it is {shown(value)}")
    return value


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
