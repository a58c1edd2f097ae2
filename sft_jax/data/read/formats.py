"""The formats that rows come in, and what each of them says.

==================  ==================================================================================================
``messages``        ``{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}``;
                    also in a message ``tool_calls``, ``name``, ``reasoning_content`` or ``thinking``, and whether it is
                    trained (:mod:`sft_jax.data.read.flags`)
``sharegpt``        ``{"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}``;
                    also turns from ``function_call`` and ``observation``
``alpaca``          ``{"instruction": "Add.", "input": "2+2", "output": "4"}``; also ``history``
``question-answer`` ``{"question": "2+2?", "answer": "4"}``, or ``query`` and ``response``, or ``input`` and ``output``
``prompt-completion``  ``{"prompt": "2+2=", "completion": "4"}``: plain text, or messages on either side
``text``            ``{"text": "2+2=4"}``: everything is trained
``tokens``          ``{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}``, or ``assistant_masks``: ``[0, 1, 1]``
==================  ==================================================================================================

Every format of chats also has ``system`` (or ``system_prompt``), ``tools`` (or ``functions``; a list or JSON) and
``chat_template_kwargs``. What a format does not read is told with the row (:attr:`Conversation.unread`), or refused
where it plainly means something.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from sft_jax.data.read.flags import refuse_telling, weights_of_row
from sft_jax.data.read.messages import (
    MEDIA,
    checked,
    read_json,
    read_messages,
    read_template_kwargs,
    read_text,
    read_tools,
)
from sft_jax.data.read.rows import Conversation, Document, Message, Row, RowError, Tokens, shown

# In the order they are looked for: each with the columns that tell it.
_TELLING: tuple[tuple[str, tuple[str, ...]], ...] = (
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
FORMATS = tuple(dict.fromkeys(name for name, _ in _TELLING))
# Every column a format reads, which a config may give another name.
COLUMNS = tuple(
    dict.fromkeys(
        [*(c for _, columns in _TELLING for c in columns), "tools", "system", "history", "chat_template_kwargs"]
    )
)

_IGNORED_LABEL = -100
_SYSTEM = ("system", "system_prompt", "system_message")
_OF_TOKENISERS = ("special_tokens_mask",)  # a mask that says nothing about training
# What other data sets call a column, from the likeliest on.
_OTHER_NAMES = {
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns", "message"),
    "question": ("question", "query", "prompt", "instruction", "problem", "input", "user", "human", "task"),
    "answer": (
        "answer", "response", "output", "completion", "answers", "solution", "target", "assistant", "gpt", "reply",
    ),
}  # fmt: skip


def detect(columns: Collection[str]) -> str | None:
    """The format that a row with these columns has; None if none is known."""
    return next((name for name, needed in _TELLING if set(needed) <= set(columns)), None)


def missing_column(row_format: str, columns: Collection[str]) -> str | None:
    """A column that ``row_format`` needs and that is not there; None if nothing is missing."""
    variants = [needed for name, needed in _TELLING if name == row_format]
    lacking = [[column for column in needed if column not in columns] for needed in variants]
    return min(lacking, key=len)[0] if all(lacking) else None


def is_message(columns: Collection[str]) -> bool:
    """Whether a row is one message of a conversation, and not a conversation: it names the message before it."""
    return bool({"parent_id", "message_tree_id", "parent_message_id"} & set(columns))


def suggestion(columns: Collection[str]) -> str:
    """What to do about columns in which no format is found."""
    have = {name.lower(): name for name in columns}
    found = {ours: next((have[name] for name in names if name in have), None) for ours, names in _OTHER_NAMES.items()}
    if found["messages"]:
        return f"if {found['messages']!r} has the messages, say data.*.columns: {{messages: {found['messages']}}}"
    if found["question"] and found["answer"]:
        asked, answered = found["question"], found["answer"]
        return f"if this is what they are, say data.*.columns: {{question: {asked}, answer: {answered}}}"
    return "data.*.columns gives columns other names"


class _Reading(Mapping[str, Any]):
    """A row that knows which of its columns were asked for."""

    def __init__(self, row: Mapping[str, Any]):
        self._row = row
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return self._row[name]

    def __contains__(self, name: object) -> bool:
        return name in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def parse(row_format: str, row: Mapping[str, Any], keep_reasoning: bool = True, ignored: Collection[str] = ()) -> Row:
    """What a row says.

    Args:
        row_format: one of :data:`FORMATS`.
        keep_reasoning: keep what an assistant thought before it answered (``reasoning_content``, ``thinking``, or a
            leading ``<think>`` block).
        ignored: columns, and keys of messages, that are left out on purpose.

    Raises:
        RowError: something is missing, of the wrong type, or cannot be trained on.
    """
    unread = {f"{name}, by ignore_columns" for name in ignored if row.get(name) is not None}
    reading = _Reading({name: value for name, value in row.items() if name not in ignored} if unread else row)
    if row_format == "text":
        found: Row = Document("", read_text(reading, "text"))
    elif row_format == "tokens":
        found = _tokens(reading)
    else:
        found = _chat(row_format, reading, keep_reasoning, unread, ignored)
    for name in reading.keys() - reading.asked:
        value = reading._row[name]
        if value is None:
            continue
        if name not in _OF_TOKENISERS:
            refuse_telling(name, value, "the column")
        if value and (name in MEDIA or (name in (*_SYSTEM, "tools", "functions") and row_format != "tokens")):
            what = "only text" if name in MEDIA else "plain text, which a column of its own has no place in,"
            raise RowError(f"has {name!r}; {what} can be trained on (data.*.ignore_columns: [{name}] leaves it out)")
        unread.add(name)
    return replace(found, unread=frozenset(unread))


def _chat(
    row_format: str, row: Mapping[str, Any], keep_reasoning: bool, unread: set[str], ignored: Collection[str]
) -> Conversation | Document:
    """A conversation, or a document where prompt and completion are plain text."""
    weights: list[float | None] = []
    if row_format == "alpaca":
        messages = _alpaca(row)
    elif row_format in ("question-answer", "prompt-completion"):
        asked, answered = "prompt", "completion"
        if row_format == "question-answer":
            asked = next((name for name in ("question", "query") if name in row), "input")
            answered = next((name for name in ("answer", "response") if name in row), "output")
        sides = [isinstance(row.get(name), list) for name in (asked, answered)]
        if row_format == "prompt-completion" and not any(sides):
            return Document(read_text(row, "prompt"), read_text(row, "completion"))
        messages = []
        for name, role, is_list in zip((asked, answered), ("user", "assistant"), sides, strict=True):
            if is_list:
                more, of_them = read_messages(row, name, keep_reasoning, unread, ignored)
            else:
                more, of_them = [_message(role, read_text(row, name))], [None]
            if role == "user" and (is_list or row_format == "prompt-completion"):
                of_them = [weight or 0.0 for weight in of_them]  # given: not trained, unless it says so itself
            messages, weights = messages + more, [*weights, *of_them]
    else:
        key = "conversations" if row_format == "sharegpt" else "messages"
        messages, weights = read_messages(row, key, keep_reasoning, unread, ignored)
    if row_format not in ("alpaca", "question-answer") or any(weight is not None for weight in weights):
        weights = _both(weights, weights_of_row(row, len(messages)))
    weights = weights or [None] * len(messages)
    system = _system(row, messages)
    weights = [*(None for _ in system), *weights]
    return Conversation(system + messages, weights, read_tools(row), read_template_kwargs(row))


def _both(weights: list[float | None], of_row: list[float | None]) -> list[float | None]:
    """What messages say of themselves, and what the row says of them."""
    for i, (one, other) in enumerate(zip(weights, of_row, strict=True)):
        if None not in (one, other) and one != other:
            raise RowError(f"message {i} and a column of the row say different things about whether it is trained")
    return [other if one is None else one for one, other in zip(weights, of_row, strict=True)]


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise RowError(f"'history' must be a list of [question, answer] pairs, it is {shown(history)}")
    for asked, answered in history:
        messages += [_message("user", checked(asked, "history")), _message("assistant", checked(answered, "history"))]
    instruction = read_text(row, "instruction")
    given = "" if row.get("input") is None else read_text(row, "input")
    asked = "\n".join(part for part in (instruction, given) if part.strip()) or instruction
    return [*messages, _message("user", asked), _message("assistant", read_text(row, "output"))]


def _system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The system prompt in a column of its own, as a message where the messages do not begin with it."""
    found = {name: read_text(row, name) for name in _SYSTEM if row.get(name) is not None}
    texts = {text for text in found.values() if text}
    if not texts:
        return []
    names = " and ".join(map(repr, found))
    if len(texts) > 1:
        raise RowError(f"{names} have different system prompts; leave one out with data.*.ignore_columns")
    (text,) = texts
    given = [message.get("content", "") for message in messages if message["role"] in ("system", "developer")]
    if not given:
        return [_message("system", text)]
    if text.strip() in (one.strip() for one in given):
        return []
    raise RowError(
        f"{names} and the messages have different system prompts; leave the column out with data.*.ignore_columns"
    )


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
