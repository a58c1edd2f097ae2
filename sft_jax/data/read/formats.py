"""Detects the format of rows, and parses them.

==================  ==================================================================================================
``messages``        ``{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}``;
                    a message may have ``tool_calls``, ``name``, ``reasoning_content`` or ``thinking``, and a flag or
                    loss weight (:mod:`sft_jax.data.read.flags`)
``sharegpt``        ``{"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}``;
                    also turns from ``function_call`` and ``observation``
``alpaca``          ``{"instruction": "Add.", "input": "2+2", "output": "4"}``; also ``history``
``question-answer`` ``{"question": "2+2?", "answer": "4"}``, or ``query`` and ``response``, or ``input`` and ``output``
``prompt-completion``  ``{"prompt": "2+2=", "completion": "4"}``: plain text, or messages on either side
``text``            ``{"text": "2+2=4"}``: all tokens are supervised
``tokens``          ``{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}``, or ``assistant_masks``: ``[0, 1, 1]``
==================  ==================================================================================================

Held-out rows may have several accepted answers (:mod:`sft_jax.data.read.accepted`).

All chat formats may have ``system`` (or ``system_prompt``), ``tools`` (or ``functions``; a list or JSON) and
``chat_template_kwargs``. Unused columns are listed in :attr:`Conversation.unread`; rows with unused columns that look
like flags, media, tools or system prompts are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from sft_jax.data.read.accepted import read_accepted
from sft_jax.data.read.flags import refuse_unknown_flag, weights_of_row
from sft_jax.data.read.messages import (
    MEDIA,
    checked,
    only_text,
    read_json,
    read_messages,
    read_template_kwargs,
    read_text,
    read_tools,
)
from sft_jax.data.read.rows import Conversation, Document, Message, Row, RowError, Tokens, shown

# Formats in the order of detection, each with the columns that identify it.
_IDENTIFYING: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("prompt-completion", ("prompt", "completion")),
    ("alpaca", ("instruction", "output")),
    ("question-answer", ("question", "answer")),
    ("question-answer", ("query", "response")),
    ("question-answer", ("question", "response")),
    ("question-answer", ("query", "answer")),
    ("question-answer", ("input", "output")),
    ("tokens", ("input_ids", "labels")),
    ("tokens", ("input_ids", "assistant_masks")),
    ("text", ("text",)),
)
FORMATS = tuple(dict.fromkeys(name for name, _ in _IDENTIFYING))
# The columns that `data.*.columns` can rename.
COLUMNS = tuple(
    dict.fromkeys(
        [*(c for _, columns in _IDENTIFYING for c in columns), "tools", "system", "history", "chat_template_kwargs"]
    )
)

_IGNORED_LABEL = -100
_SYSTEM = ("system", "system_prompt", "system_message")
_TOKENIZER_OUTPUTS = ("special_tokens_mask",)  # a mask that is not a loss mask
# Names of columns in other datasets, the most likely first.
_OTHER_NAMES = {
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns", "message"),
    "question": ("question", "query", "prompt", "instruction", "problem", "input", "user", "human", "task"),
    "answer": (
        "answer", "response", "output", "completion", "answers", "solution", "target", "assistant", "gpt", "reply",
    ),
}  # fmt: skip


def detect(columns: Collection[str]) -> str | None:
    """Return the format of a row with these columns; None if it is unknown."""
    return next((name for name, needed in _IDENTIFYING if set(needed) <= set(columns)), None)


def missing_column(row_format: str, columns: Collection[str]) -> str | None:
    """Return a missing column that ``row_format`` requires; None if no column is missing."""
    variants = [needed for name, needed in _IDENTIFYING if name == row_format]
    missing = [[column for column in needed if column not in columns] for needed in variants]
    return min(missing, key=len)[0] if all(missing) else None


def is_message(columns: Collection[str]) -> bool:
    """Whether a row is a single message of a conversation tree, with the id of its parent."""
    return bool({"parent_id", "message_tree_id", "parent_message_id"} & set(columns))


def likely_columns(columns: Collection[str]) -> dict[str, str]:
    """Guess a value of ``data.*.columns`` for columns of an unknown format; empty if nothing is likely."""
    lowercase = {name.lower(): name for name in columns}
    likely = {
        ours: next((lowercase[name] for name in names if name in lowercase), None)
        for ours, names in _OTHER_NAMES.items()
    }
    messages, question, answer = (likely[name] for name in ("messages", "question", "answer"))
    if messages:
        return {"messages": messages}
    return {"question": question, "answer": answer} if question and answer else {}


def suggestion(columns: Collection[str]) -> str:
    """Suggest a value of ``data.*.columns`` for columns of an unknown format."""
    likely = likely_columns(columns)
    if not likely:
        return "rename columns with data.*.columns"
    pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in likely.items())
    what = f"{likely['messages']!r} holds the messages" if "messages" in likely else "they are questions and answers"
    return f"if {what}, set data.*.columns: {{{pairs}}}"


class _TrackedRow(Mapping[str, Any]):
    """A row that records which of its columns are read."""

    def __init__(self, row: Mapping[str, Any]):
        self._row = row
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.used.add(name)
        return self._row[name]

    def __contains__(self, name: object) -> bool:
        return name in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def parse(
    row_format: str,
    row: Mapping[str, Any],
    keep_reasoning: bool = True,
    ignored: Collection[str] = (),
    is_held_out: bool = False,
) -> Row:
    """Parse a row.

    Args:
        row_format: one of :data:`FORMATS`.
        keep_reasoning: whether to keep the reasoning of assistant messages (``reasoning_content``, ``thinking``, or a
            leading ``<think>`` block).
        ignored: columns, and keys of messages, to ignore.
        is_held_out: whether the row may have several accepted answers.

    Raises:
        RowError: a value is missing, has the wrong type, or is not supported.
    """
    unread = {f"{name}, by ignore_columns" for name in ignored if row.get(name) is not None}
    row = {name: value for name, value in row.items() if name not in ignored} if unread else row
    row, accepted = read_accepted(row_format, row, is_held_out)
    tracked = _TrackedRow(row)
    if row_format == "text":
        parsed: Row = Document("", read_text(tracked, "text"))
    elif row_format == "tokens":
        parsed = _tokens(tracked)
    else:
        parsed = _chat(row_format, tracked, keep_reasoning, unread, ignored)
    for name in tracked.keys() - tracked.used:
        value = tracked._row[name]
        if value is None:
            continue
        if name not in _TOKENIZER_OUTPUTS:
            refuse_unknown_flag(name, value, "the column")
        if value and (name in MEDIA or (name in (*_SYSTEM, "tools", "functions") and row_format != "tokens")):
            if name in MEDIA:
                raise RowError(f"has {name!r}; {only_text(name)}")
            reason = "plain text has no system prompt and no tools"
            raise RowError(f"has {name!r}; {reason} (ignore the column with data.*.ignore_columns: [{name}])")
        unread.add(name)
    if accepted and isinstance(parsed, Conversation) and _is_unsupervised(parsed):
        raise RowError("has several accepted answers, but its last message is no answer that carries loss")
    return replace(parsed, unread=frozenset(unread), accepted=accepted)


def _is_unsupervised(parsed: Conversation) -> bool:
    return parsed.messages[-1]["role"] != "assistant" or parsed.weights[-1] == 0


def _chat(
    row_format: str, row: Mapping[str, Any], keep_reasoning: bool, unread: set[str], ignored: Collection[str]
) -> Conversation | Document:
    """Parse a conversation, or a document if prompt and completion are plain text."""
    weights: list[float | None] = []
    if row_format == "alpaca":
        messages = _alpaca(row)
    elif row_format in ("question-answer", "prompt-completion"):
        question, answer = "prompt", "completion"
        if row_format == "question-answer":
            question = next((name for name in ("question", "query") if name in row), "input")
            answer = next((name for name in ("answer", "response") if name in row), "output")
        sides = [isinstance(row.get(name), list) for name in (question, answer)]
        if row_format == "prompt-completion" and not any(sides):
            return Document(read_text(row, "prompt"), read_text(row, "completion"))
        messages = []
        for name, role, is_list in zip((question, answer), ("user", "assistant"), sides, strict=True):
            if is_list:
                more, more_weights = read_messages(row, name, keep_reasoning, unread, ignored)
            else:
                more, more_weights = [_message(role, read_text(row, name))], [None]
            if role == "user" and (is_list or row_format == "prompt-completion"):
                more_weights = [weight or 0.0 for weight in more_weights]  # prompts are masked unless flagged
            messages, weights = messages + more, [*weights, *more_weights]
    else:
        key = "conversations" if row_format == "sharegpt" else "messages"
        messages, weights = read_messages(row, key, keep_reasoning, unread, ignored)
    if row_format not in ("alpaca", "question-answer") or any(weight is not None for weight in weights):
        weights = _merge_weights(weights, weights_of_row(row, len(messages)))
    weights = weights or [None] * len(messages)
    system = _system(row, messages)
    weights = [*(None for _ in system), *weights]
    return Conversation(system + messages, weights, read_tools(row), read_template_kwargs(row))


def _merge_weights(weights: list[float | None], of_row: list[float | None]) -> list[float | None]:
    """Merge the loss weights in the messages with those in a column of the row."""
    for i, (one, other) in enumerate(zip(weights, of_row, strict=True)):
        if None not in (one, other) and one != other:
            raise RowError(f"message {i} and a column of the row contradict each other about its loss weight")
    return [other if one is None else one for one, other in zip(weights, of_row, strict=True)]


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise RowError(f"'history' must be a list of [question, answer] pairs, it is {shown(history)}")
    for question, answer in history:
        messages += [_message("user", checked(question, "history")), _message("assistant", checked(answer, "history"))]
    instruction = read_text(row, "instruction")
    context = "" if row.get("input") is None else read_text(row, "input")
    question = "\n".join(part for part in (instruction, context) if part.strip()) or instruction
    return [*messages, _message("user", question), _message("assistant", read_text(row, "output"))]


def _system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Return the system prompt of a column as a message; empty if there is none, or if the messages have it already."""
    columns = {name: read_text(row, name) for name in _SYSTEM if row.get(name) is not None}
    texts = {text for text in columns.values() if text}
    if not texts:
        return []
    names = " and ".join(map(repr, columns))
    if len(texts) > 1:
        raise RowError(f"{names} have different system prompts; ignore one of them with data.*.ignore_columns")
    (text,) = texts
    in_messages = [message.get("content", "") for message in messages if message["role"] in ("system", "developer")]
    if not in_messages:
        return [_message("system", text)]
    if text.strip() in (one.strip() for one in in_messages):
        return []
    raise RowError(
        f"{names} and the messages have different system prompts; ignore the column with data.*.ignore_columns"
    )


def _tokens(row: Mapping[str, Any]) -> Tokens:
    ids = _integers(row, "input_ids")
    if "assistant_masks" in row:
        weights = [float(value) for value in _integers(row, "assistant_masks")]
        if not set(weights) <= {0.0, 1.0}:
            raise RowError("'assistant_masks' must contain only 0 and 1")
    else:
        labels = _integers(row, "labels")
        wrong = [i for i, (a, b) in enumerate(zip(ids, labels, strict=False)) if b not in (a, _IGNORED_LABEL)]
        if wrong:
            raise RowError(
                f"'labels' differs from 'input_ids' at position {wrong[0]}; a label must be {_IGNORED_LABEL} or the id "
                "at the same position; labels are shifted during training, so the data must not be shifted"
            )
        weights = [float(label != _IGNORED_LABEL) for label in labels]
    if len(weights) != len(ids):
        raise RowError(f"'input_ids' has {len(ids)} tokens, but the labels or mask have {len(weights)}")
    if row.get("attention_mask") is not None:
        attended = _integers(row, "attention_mask")
        if len(attended) != len(ids):
            raise RowError(f"'input_ids' has {len(ids)} tokens, but 'attention_mask' has {len(attended)}")
        positions = [i for i, one in enumerate(attended) if one]
        if positions != list(range(positions[0], positions[-1] + 1)) if positions else True:
            raise RowError("'attention_mask' must be one contiguous range of ones, with zeros only at the ends")
        ids, weights = ids[positions[0] : positions[-1] + 1], weights[positions[0] : positions[-1] + 1]
    return Tokens(ids, weights)


def _integers(row: Mapping[str, Any], key: str) -> list[int]:
    value = row.get(key)
    value = read_json(value, f"{key!r}") if isinstance(value, str) else value
    if not isinstance(value, list) or not value or not all(type(one) is int for one in value):
        raise RowError(f"{key!r} must be a list of integers, it is {shown(value)}")
    return value


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
