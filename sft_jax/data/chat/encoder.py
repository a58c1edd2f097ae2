"""Encodes rows as token ids and a loss mask.

The loss mask never depends on token ids. :mod:`sft_jax.data.chat.turns` locates each assistant turn in the rendered
text, and the offsets of the tokenizer map its characters to tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from string import ascii_lowercase
from typing import Any

import numpy as np

from sft_jax.data.chat.encoded import Encoded, Tally
from sft_jax.data.chat.segments import SegmentEncoder, refuse_long
from sft_jax.data.chat.stops import StopTokens
from sft_jax.data.chat.template import ChatTemplates
from sft_jax.data.chat.template_limits import enforce_limits
from sft_jax.data.chat.turns import Rendered, TurnFinder
from sft_jax.data.read.rows import Conversation, Document, Message, Row, RowError, Tokens, utf8_size
from sft_jax.errors import UserError
from sft_jax.files.foreign import reading

STRADDLING = "tokens across the boundary of prompt and answer, masked out"
JOINED = "tokens across the boundary of prompt and answer, supervised because only spaces precede the boundary"
MARKED_STRADDLING = "tokens across the start of a {% generation %} block, supervised"
_CHAT_TOKEN = re.compile(
    r"<\|im_start\|>(?=\w)|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|(?:user|assistant|start|turn)\|?>|<｜User｜>"
)
_ONLY_STOP = (
    "the only token of the answer also contains characters of the prompt, so only the stop token would be supervised"
)


@dataclass
class Encoder:
    """Encodes rows with one tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer.
        train_on: ``assistant`` (every assistant turn), ``last_assistant``, or ``all`` (every token).
        stop_token: the token that ends a completion or a document; default the tokenizer's EOS token. In chats, the
            template writes the end-of-turn tokens.
        stop_ids: ids that generation already stops at, such as those in ``generation_config.json``.
        keep_reasoning: whether rows are read with the reasoning of assistant messages.
        today: date used by ``strftime_now``, YYYY-MM-DD; default the date on which the encoder is created, the same
            for all rows. Set to None if the template does not use ``strftime_now``.
    """

    tokenizer: Any
    train_on: str = "assistant"
    stop_token: str | None = None
    stop_ids: Sequence[int] = ()
    keep_reasoning: bool = True
    today: str | None = None
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        self._stops = StopTokens(tokenizer, self.stop_token, self.stop_ids)
        # transformers sets these before each call; here the backend tokenizer is called directly
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self._finder = self._segments = None
        self._templates = ChatTemplates.of(tokenizer, self.today or date.today().isoformat())
        if self._templates is not None:
            self._segments = SegmentEncoder(tokenizer, "".join(self._templates.sources.values()))
            texts = [text for text in tokenizer.convert_ids_to_tokens(sorted(self._stops.special)) if text]
            self._finder = TurnFinder(self._templates, texts)
        self.today = self._templates.today if self._templates and self._templates.uses_date else None

    @property
    def mask_source(self) -> str:
        """How the loss mask of a chat is computed, for the start-up report."""
        if self._templates is None:
            return "prompt and completion"
        methods = dict.fromkeys(
            "{% generation %} blocks of the template" if template.is_marked else "renderings before and after each turn"
            for template in self._templates.all.values()
        )
        return " or ".join(methods)

    def encode(self, rows: Sequence[Row | RowError]) -> list[list[Encoded] | RowError]:
        """Encode rows.

        Returns:
            For each row its example, several examples if the template rewrites earlier turns, or the reason why the
            row cannot be used.

        Raises:
            UserError: the tokenizer has no chat template or no EOS token, and the rows need one.
        """
        prepared: list[tuple[Row, list[Rendered], dict[int, float], set[str]] | RowError] = []
        with enforce_limits():
            for row in rows:
                try:
                    if isinstance(row, RowError):
                        raise row
                    weights = self._weights(row) if isinstance(row, Conversation) else {}
                    refuse_long(row.num_bytes)
                    texts, unread = self._render(row, weights)
                    refuse_long(max((utf8_size(text.text) for text in texts), default=0))
                    if len(texts) > 1 and self.train_on == "all":
                        raise RowError(
                            "the template rewrites earlier turns, so no single text contains all of them, and "
                            "train_on=all would supervise some turns twice; use train_on=assistant"
                        )
                    prepared.append((row, texts, weights, unread))
                except RowError as error:
                    prepared.append(error)
        valid = [one for one in prepared if not isinstance(one, RowError)]
        documents = [text.text for row, texts, *_ in valid if isinstance(row, Document) for text in texts]
        chats = [text.text for row, texts, *_ in valid if isinstance(row, Conversation) for text in texts]
        with reading("tokenizer.json: the tokenizer fails on a text"):
            document_encodings = iter(self.tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=True))
            chat_encodings = iter(self._segments(chats) if self._segments is not None else [])
        results: list[list[Encoded] | RowError] = []
        for one in prepared:
            if isinstance(one, RowError):
                results.append(one)
                continue
            row, texts, weights, unread = one
            tally = Tally()
            try:
                if isinstance(row, Tokens):
                    encoded = [self._encode_tokens(row, tally)]
                elif isinstance(row, Document):
                    encoded = [self._encode_document(row, next(document_encodings), tally)]
                else:
                    pairs = [(text, next(chat_encodings)) for text in texts]
                    encoded = [self._encode_chat(row, weights, text, encoding, tally) for text, encoding in pairs]
                if not all(example.mask[1:].any() for example in encoded):  # the first token is never predicted
                    raise RowError("nothing to train on; every token is context")
            except RowError as error:
                results.append(error)
                continue
            if self.train_on == "all" and isinstance(row, Conversation) and 0.0 in row.weights:
                tally.notes["rows whose messages with weight 0 are supervised too, because of train_on=all"] += 1
            for text in texts:
                tally.notes.update(text.notes)
            tally.unread.update(unread)
            self.tally.add(tally)
            results.append(encoded)
        return results

    def _render(self, row: Row, weights: dict[int, float]) -> tuple[list[Rendered], set[str]]:
        """Return the texts of a row, and the names of its unused columns and keys."""
        if isinstance(row, Tokens):
            return [], {*row.unread}
        if isinstance(row, Document):
            return [Rendered(row.prompt + row.completion, {}, [])], {*row.unread}
        if self._finder is None:
            raise UserError(
                "data.chat_template: the tokenizer has no chat template; give a Jinja file, or builtin:chatml.jinja "
                "with data.added_tokens=['<|im_start|>','<|im_end|>']"
            )
        texts, unread = self._finder.find(row, sorted(weights))
        return texts, unread | row.unread

    def _weights(self, row: Conversation) -> dict[int, float]:
        """Return the loss weight of each supervised message, by the number of the message."""
        answers = {i for i, message in enumerate(row.messages) if message["role"] == "assistant"}
        weights = {}
        for i, weight in enumerate(row.weights):
            if i in answers:
                weights[i] = 1.0 if weight is None else weight
            elif weight:
                raise RowError(f"message {i} ({row.messages[i]['role']}): only assistant messages can be supervised")
        supervised = {i: weight for i, weight in weights.items() if weight > 0}
        if not supervised:
            raise RowError("no assistant message to train on" + (", all have weight 0" if answers else ""))
        if self.train_on == "last_assistant":
            last = max(supervised)
            return {last: supervised[last]}
        return supervised

    def _encode_chat(
        self, row: Conversation, weights: dict[int, float], text: Rendered, encoding: Any, tally: Tally
    ) -> Encoded:
        ids = encoding.ids
        mask = (np.ones if self.train_on == "all" else np.zeros)(len(ids), np.float32)
        bos = self.tokenizer.bos_token_id
        if ids[:2] == [bos, bos]:
            raise RowError(f"the chat template writes the token {self.tokenizer.bos_token!r} twice at the start")
        num_targets = 0
        for i, (begin, end) in text.turns.items():
            first, last, lost = self._token_span(encoding, text, begin, end, tally)
            last, stop_id = self._stops.find_end(ids, first, last, text.is_marked, i, row.messages[i])
            tally.stops[stop_id] += 1
            if lost.strip() and self.train_on != "all" and self._stops.all_stop_or_whitespace(ids[first:last]):
                raise RowError(f"message {i}: {_ONLY_STOP}; end the template's generation prompt with a whole token")
            mask[first:last] = weights[i]
            num_targets += last - first
        tally.targets["assistant"] += num_targets
        num_located = 0
        for role, (begin, end) in text.contents:
            first, last = encoding.char_to_token(begin), encoding.char_to_token(end - 1)
            if first is not None and last is not None:
                tally.tokens[role] += last + 1 - first
                num_located += last + 1 - first
        tally.tokens["template"] += len(ids) - num_located
        if self.train_on == "all":
            tally.targets = tally.tokens.copy()
        return Encoded(np.asarray(ids, np.int32), mask)

    def _token_span(
        self, encoding: Any, rendered: Rendered, begin: int, end: int, tally: Tally
    ) -> tuple[int, int, str]:
        """Find the supervised tokens of the characters ``begin … end``.

        A first token that starts before ``begin`` is supervised only if the template marks its turns with
        ``{% generation %}``, as in transformers, or if the token has only spaces before ``begin``.

        Returns:
            Start and end of the tokens, and the characters of the turn in a first token that is masked out.
        """
        if end <= begin:
            return 0, 0, ""
        first, last = encoding.char_to_token(begin), encoding.char_to_token(end - 1)
        while first is None and begin < end - 1:  # some characters belong to no token, such as some spaces
            begin += 1
            first = encoding.char_to_token(begin)
        while last is None and end > begin + 1:
            end -= 1
            last = encoding.char_to_token(end - 1)
        if first is None or last is None:
            raise RowError("the tokenizer drops the text of a supervised turn, so its tokens cannot be located")
        text, token = rendered.text, encoding.token_to_chars(first)
        if token[0] >= begin:
            return first, last + 1, ""
        if rendered.is_marked:
            tally.notes[MARKED_STRADDLING] += 1
        elif not _joins_answer(text[token[0] : begin], tally):
            return first + 1, last + 1, text[begin : token[1]]
        return first, last + 1, ""

    def _encode_document(self, row: Document, encoding: Any, tally: Tally) -> Encoded:
        """Tokenize prompt and completion as one string, then append the stop token.

        With ids ``[1, 10, 11]`` for the prompt ``ab`` and ``[12]`` for the completion ``c``, the stop id 2 and a
        tokenizer that prepends a 1: ids ``[1, 10, 11, 12, 2]``, mask ``[0, 0, 0, 1, 1]``.
        """
        stop_id = self._stops.default
        if stop_id is None:
            raise UserError("data.stop_token: the tokenizer has no EOS token to end a document with; name a token")
        ids, boundary, lost = encoding.ids, len(row.prompt), ""
        if self.train_on == "all" or boundary == 0:
            mask = np.ones(len(ids), np.float32)
        else:
            mask = np.asarray([float(start >= boundary and end > start) for start, end in encoding.offsets], np.float32)
            for at, (start, end) in enumerate(encoding.offsets):
                if not start < boundary < end:
                    continue
                if _joins_answer(row.prompt[start:], tally):
                    mask[at] = 1.0
                else:
                    lost += row.completion[: end - boundary]
            if lost.strip() and self._stops.all_stop_or_whitespace([ids[at] for at in np.flatnonzero(mask)]):
                raise RowError(f"{_ONLY_STOP}; end the prompt with a whole word")
        body = len(ids) - (ids[-1:] == [stop_id])  # the text may already end with the stop token
        stops_inside = self._stops.ids.intersection(np.asarray(ids, np.int32)[:body][mask[:body] > 0].tolist())
        if chat_token := _CHAT_TOKEN.search(row.completion):
            tally.notes[f"plain texts with chat template tokens ({chat_token[0]}), every token supervised"] += 1
        elif stops_inside:
            token = self._stops.texts[min(stops_inside)]
            raise RowError(f"the text contains the stop token {token!r}, at which generation would end")
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:  # the text begins with a BOS token itself
            ids, mask = ids[1:], mask[1:]
        if ids and ids[-1] == stop_id:
            mask[-1] = 1.0
        else:
            ids, mask = [*ids, stop_id], np.append(mask, np.float32(1.0))
        tally.stops[stop_id] += 1
        num_targets = int((mask > 0).sum())
        tally.tokens.update({"completion": num_targets, "prompt": len(ids) - num_targets})
        tally.targets["completion"] += num_targets
        return Encoded(np.asarray(ids, np.int32), mask)

    def _encode_tokens(self, row: Tokens, tally: Tally) -> Encoded:
        size = len(self.tokenizer)
        for token in row.ids:
            if not 0 <= token < size:
                raise RowError(f"token {token} is not in the tokenizer's vocabulary of {size:,}")
        mask = np.asarray(row.weights, np.float32)
        if self.train_on == "all":
            mask = np.ones_like(mask)
        supervised = np.flatnonzero(mask)
        if len(supervised) and row.ids[supervised[-1]] in self._stops.special:
            tally.stops[row.ids[supervised[-1]]] += 1
        else:
            tally.notes["tokenized rows whose supervised tokens do not end with a stop token"] += 1
        tally.tokens.update({"completion": len(supervised), "prompt": len(row.ids) - len(supervised)})
        tally.targets["completion"] += len(supervised)
        return Encoded(np.asarray(row.ids, np.int32), mask)


def _joins_answer(before: str, tally: Tally) -> bool:
    """Decide whether a token across the boundary is supervised, and count it in the notes.

    Spaces before a word belong to the word.

    Args:
        before: the characters of the token that belong to the prompt.
    """
    is_space = not before.strip(" ")
    tally.notes[JOINED if is_space else STRADDLING] += 1
    return is_space


def prompt_ids(tokenizer: Any, messages: list[Message], today: str | None = None) -> list[int]:
    """Tokenize messages followed by the generation prompt.

    Args:
        today: date used by ``strftime_now``, YYYY-MM-DD; default the current date.

    Raises:
        UserError: there is no chat template, or it rejects the messages.
    """
    templates = ChatTemplates.of(tokenizer, today)
    if templates is None:
        raise UserError("the model has no chat template; use plain text (--raw), or add a chat_template.jinja")
    try:
        with enforce_limits():
            text, _ = templates.choose(has_tools=False).render(messages, prompt=True)
    except RowError as error:
        raise UserError(str(error)) from error
    return context_ids(tokenizer, text, add_special_tokens=False)


def context_ids(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Tokenize a text to be continued, as in training: without a last space that belongs to the next word's token."""
    if text.endswith(" ") and text.strip():
        continued = [
            text + letter for letter in ascii_lowercase
        ]  # small vocabularies join a space to some letters only
        offsets = tokenizer(continued, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        if any(start < len(text) < end for one in offsets["offset_mapping"] for start, end in one):
            text = text[:-1]
    return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
