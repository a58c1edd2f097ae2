"""From one row to token ids and the mask of what is trained: always made together, by one function.

The mask never follows from a token id. It comes from where the template puts each assistant turn: from the template's
own ``{% generation %}`` marks, or, without them, from comparing renderings that end before and after the turn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from sft_jax.errors import UserError

_QUIET = {"verbose": False}  # lengths are ours to judge, not the tokenizer's
Message = dict[str, Any]
Span = tuple[int, int]


class RowError(ValueError):
    """Why one row cannot be trained on; the caller adds file and row.

    Args:
        index: the row's place among those given.
    """

    def __init__(self, reason: str, index: int = 0):
        super().__init__(reason)
        self.index = index


@dataclass(frozen=True)
class Encoded:
    """``mask[i]`` says whether the loss counts predicting ``ids[i]``."""

    ids: list[int]
    mask: list[bool]


@dataclass
class Encoder:
    """Encodes rows with one tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer.
        train_on: ``assistant`` (every assistant turn), ``last_assistant``, or ``all`` (every token).
        stop_token: what ends a completion or a document; default the tokenizer's eos token. Chats end their turns
            with what the template writes.
    """

    tokenizer: Any
    train_on: str = "assistant"
    stop_token: str | None = None
    stop_counts: Counter[int] = field(default_factory=Counter)  # how often each stop token ended a trained turn
    num_straddling: int = 0  # tokens across the edge of a trained turn: not trained

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._stop_id = tokenizer.eos_token_id
        if self.stop_token is not None:
            self._stop_id = tokenizer.convert_tokens_to_ids(self.stop_token)
            if self._stop_id is None or self._stop_id == tokenizer.unk_token_id:
                raise UserError(
                    f"data.stop_token: the tokenizer has no token {self.stop_token!r}; add it to data.added_tokens"
                )
        if self._stop_id is not None:
            self._special.add(self._stop_id)
        template = tokenizer.chat_template or ""
        self.is_marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    @property
    def mask_source(self) -> str:
        """How the mask of a chat is found, for the start-up report."""
        return "the template's {% generation %} marks" if self.is_marked else "renderings before and after each turn"

    def encode(self, row_format: str, rows: Sequence[dict[str, Any]]) -> list[Encoded]:
        """Encode rows of one format (``messages``, ``prompt-completion`` or ``text``).

        Raises:
            RowError: the first row that cannot be trained on.
            UserError: the tokenizer lacks what the format needs.
        """
        counted = self.stop_counts.copy(), self.num_straddling
        try:
            return self._encode_batch(row_format, rows)
        except RowError:  # which row? once more, one by one
            self.stop_counts, self.num_straddling = counted
            encoded = []
            for index, row in enumerate(rows):
                try:
                    encoded += self._encode_batch(row_format, [row])
                except RowError as error:
                    raise RowError(str(error), index) from error
            return encoded

    def _encode_batch(self, row_format: str, rows: Sequence[dict[str, Any]]) -> list[Encoded]:
        if row_format == "text":
            return [self._encode_text("", _string(row, "text"), everything=True) for row in rows]
        if row_format == "messages":
            chats = [(_messages(row, "messages"), 0) for row in rows]
            return self._encode_chats(chats)
        if all(isinstance(row.get("prompt"), list) for row in rows):
            chats = []
            for row in rows:
                prompt = _messages(row, "prompt")
                in_prompt = sum(message["role"] == "assistant" for message in prompt)
                chats.append((prompt + _messages(row, "completion"), in_prompt))
            return self._encode_chats(chats)
        everything = self.train_on == "all"
        return [self._encode_text(_string(row, "prompt"), _string(row, "completion"), everything) for row in rows]

    def _encode_text(self, prompt: str, completion: str, everything: bool) -> Encoded:
        """Prompt and completion tokenised as one string, then the stop token.

        With ids ``[1, 10, 11]`` for the prompt ``ab`` and ``[12]`` for the completion ``c``, the stop id 2 and a
        tokenizer that puts a 1 in front: ids ``[1, 10, 11, 12, 2]``, mask ``[0, 0, 0, 1, 1]``.
        """
        if self._stop_id is None:
            raise UserError("data.stop_token: the tokenizer has no eos token to end a document with; name a token")
        encoding = self.tokenizer(prompt + completion, return_offsets_mapping=True, **_QUIET)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        if everything:
            mask = [True] * len(ids)
        else:
            mask = [start >= len(prompt) and end > start for start, end in offsets]
            self.num_straddling += sum(start < len(prompt) < end for start, end in offsets)
        if ids and ids[-1] == self._stop_id:
            mask[-1] = True
        else:
            ids, mask = [*ids, self._stop_id], [*mask, True]
        self.stop_counts[self._stop_id] += 1
        return Encoded(ids, mask)

    def _encode_chats(self, chats: Sequence[tuple[list[Message], int]]) -> list[Encoded]:
        """Chats with the number of leading assistant turns that are context only."""
        if not self.tokenizer.chat_template:
            raise UserError("data.chat_template: the tokenizer has no chat template; give a Jinja file")
        conversations = [messages for messages, _ in chats]
        located = self._marked_turns(conversations) if self.is_marked else self._compared_turns(conversations)
        encoded = []
        for (messages, num_context), (ids, turns) in zip(chats, located, strict=True):
            expected = sum(message["role"] == "assistant" for message in messages)
            if len(turns) != expected:
                raise RowError(f"the template renders {len(turns)} assistant turns of {expected}")
            turns = turns[num_context:]
            if not turns:
                raise RowError("no assistant message to train on")
            if self.train_on == "last_assistant":
                turns = turns[-1:]
            mask = [self.train_on == "all"] * len(ids)
            for start, end in turns:
                self._count_stop(ids, start, end)
                mask[start:end] = [True] * (end - start)
            encoded.append(Encoded(ids, mask))
        return encoded

    def _count_stop(self, ids: list[int], start: int, end: int) -> None:
        """Refuse a turn that does not end with a special token (whitespace may follow): it would never be stopped."""
        last = next((i for i in range(end - 1, start - 1, -1) if ids[i] in self._special), None)
        if last is None or self.tokenizer.decode(ids[last + 1 : end]).strip():
            where = "inside {% generation %}" if self.is_marked else "after an assistant message"
            raise RowError(
                f"an assistant turn does not end with a stop token; the chat template must write one {where}"
            )
        self.stop_counts[ids[last]] += 1

    def _marked_turns(self, conversations: list[list[Message]]) -> list[tuple[list[int], list[Span]]]:
        """Ids and token spans of what the template marks: exactly transformers' assistant mask, as runs."""
        encoding = self._apply_template(
            conversations, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs=_QUIET
        )
        masks = encoding["assistant_masks"]
        return [(ids, _runs(mask)) for ids, mask in zip(encoding["input_ids"], masks, strict=True)]

    def _compared_turns(self, conversations: list[list[Message]]) -> list[tuple[list[int], list[Span]]]:
        """Ids and token spans of the assistant turns of a template without marks.

        The conversation is rendered and tokenised once. Where a turn begins and ends in that text is where the
        renderings of the messages before it (with the generation prompt, as at inference) and up to it end. The turn
        is trained up to its last special token, the one that generation will stop at.
        """
        texts = self._apply_template(conversations, tokenize=False)
        encoding = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, **_QUIET)
        located = []
        for messages, text, ids, offsets in zip(
            conversations, texts, encoding["input_ids"], encoding["offset_mapping"], strict=True
        ):
            turns = []
            for i, message in enumerate(messages):
                if message["role"] == "assistant":
                    begin = self._prefix_length(messages[:i], text, i, add_generation_prompt=True)
                    end = self._prefix_length(messages[: i + 1], text, i, add_generation_prompt=False)
                    turns.append(self._token_span(ids, offsets, begin, end))
            located.append((ids, turns))
        return located

    def _apply_template(self, messages: Any, **options: Any) -> Any:
        """transformers' sandboxed rendering; whatever a template stumbles over is the row's fault or its own."""
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise RowError(f"the chat template fails: {' '.join(str(error).split())}") from error

    def _prefix_length(self, messages: list[Message], text: str, turn: int, add_generation_prompt: bool) -> int:
        prefix = self._apply_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        if not text.startswith(prefix):
            raise RowError(
                f"message {turn}: the chat template renders earlier messages differently once later ones follow, "
                "so what inference will see cannot be told; mark the template with {% generation %}"
            )
        return len(prefix)

    def _token_span(self, ids: list[int], offsets: list[Span], begin: int, end: int) -> Span:
        inside = [i for i, (start, stop) in enumerate(offsets) if start >= begin and stop <= end and stop > start]
        self.num_straddling += sum(start < begin < stop or start < end < stop for start, stop in offsets)
        stops = [i for i in inside if ids[i] in self._special]
        if not stops:
            raise RowError("the chat template writes no special token after an assistant message, so nothing stops it")
        return inside[0], stops[-1] + 1


def prompt_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Messages as the template renders them before an answer.

    Raises:
        UserError: no chat template, or messages that it refuses.
    """
    if not tokenizer.chat_template:
        raise UserError("this model has no chat template; write plain text (--raw), or add a chat_template.jinja")
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"the chat template fails: {' '.join(str(error).split())}") from error


def _runs(mask: Sequence[int]) -> list[Span]:
    """The stretches of ones: ``[0, 1, 1, 0, 1]`` → ``[(1, 3), (4, 5)]``."""
    edges = [i for i in range(len(mask) + 1) if (mask[i] if i < len(mask) else 0) != (mask[i - 1] if i else 0)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _string(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise RowError(f"{key!r} must be a string, it is {_kind(value)}")
    return value


def _messages(row: dict[str, Any], key: str) -> list[Message]:
    """The messages of a row, without the empty fields that Arrow adds to make rows alike."""
    value = row.get(key)
    if not isinstance(value, list) or not value:
        raise RowError(f"{key!r} must be a list of messages, it is {_kind(value)}")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise RowError(f"message {i} must be an object with role and content, it is {_kind(message)}")
        message = {name: part for name, part in message.items() if part is not None}
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                problem = "is missing" if name not in message else f"must be a string, it is {_kind(message[name])}"
                raise RowError(f"message {i}: {name!r} {problem}")
        messages.append(message)
    return messages


def _kind(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
