"""From one row to token ids and the mask of what is trained: always made together, by one function.

The mask never follows from a token id. It comes from where the template puts each assistant turn
(:mod:`sft_jax.data.chat.turns`), found in the text and carried over to tokens by their offsets.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from string import ascii_lowercase
from typing import Any

import numpy as np

from sft_jax.data.chat.segments import SegmentEncoder
from sft_jax.data.chat.template import ChatTemplates, can_be_interrupted
from sft_jax.data.chat.turns import Rendered, TurnFinder
from sft_jax.data.read.rows import Conversation, Document, Message, Row, RowError, Tokens
from sft_jax.errors import UserError

STRADDLING = "tokens across the edge of a trained turn, not trained"
JOINED = "tokens across the edge of a trained turn, trained because of the prompt they have only blanks"
MARKED_STRADDLING = "tokens across the edge of a trained turn, trained because the template's mark touches them"
_CHAT_MARK = re.compile(
    r"<\|im_start\|>(?=\w)|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|(?:user|assistant|start|turn)\|?>|<｜User｜>"
)
_ONLY_THE_STOP = "its only token has characters of the prompt too, so that nothing but the stop token could be trained"


@dataclass(frozen=True)
class Encoded:
    """``mask[i]`` is what the loss counts predicting ``ids[i]``: 0 for context, 1 for targets, or a weight."""

    ids: np.ndarray  # int32
    mask: np.ndarray  # float32


@dataclass
class Tally:
    """What was met on the way; sums, so that tallies of parts can be added."""

    stops: Counter[int] = field(default_factory=Counter)  # the token that ended a trained turn
    tokens: Counter[str] = field(default_factory=Counter)  # by role; what no message says is the template's
    targets: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)  # columns and keys that nothing read, and in how many rows

    def add(self, other: Tally) -> None:
        """Add another tally to this one."""
        self.stops.update(other.stops)
        self.tokens.update(other.tokens)
        self.targets.update(other.targets)
        self.notes.update(other.notes)
        self.unread.update(other.unread)


@dataclass
class Encoder:
    """Encodes rows with one tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer.
        train_on: ``assistant`` (every assistant turn), ``last_assistant``, or ``all`` (every token).
        stop_token: what ends a completion or a document; default the tokenizer's eos token. Chats end their turns
            with what the template writes.
        stop_ids: what generation stops at already, such as the ids in ``generation_config.json``.
        keep_reasoning: whether rows are read with what an assistant thought before it answered.
        today: the day that the template may tell, YYYY-MM-DD; default the one on which the encoder was made, so that
            all its rows have the same. None for a template that does not.
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
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._stop_id = tokenizer.eos_token_id
        if self.stop_token is not None:
            self._stop_id = tokenizer.convert_tokens_to_ids(self.stop_token)
            if self._stop_id is None or self._stop_id == tokenizer.unk_token_id:
                raise UserError(
                    f"data.stop_token: the tokenizer has no token {self.stop_token!r}; add it to data.added_tokens"
                )
        self._stops = {*self.stop_ids, *([] if self._stop_id is None else [self._stop_id])}
        self._special |= self._stops
        self._stop_texts = {i: tokenizer.convert_ids_to_tokens(i) for i in self._stops}
        self._blank: dict[int, bool] = {}
        # transformers sets these before each call; here the tokenizer itself is called
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self._finder = self._segments = None
        self._templates = ChatTemplates.of(tokenizer, self.today or date.today().isoformat())
        if self._templates is not None:
            self._segments = SegmentEncoder(tokenizer, "".join(self._templates.sources.values()))
            texts = [text for text in tokenizer.convert_ids_to_tokens(sorted(self._special)) if text]
            self._finder = TurnFinder(self._templates, texts)
        self.today = self._templates.today if self._templates and self._templates.tells_the_day else None

    @property
    def mask_source(self) -> str:
        """How the mask of a chat is found, for the start-up report."""
        if self._templates is None:
            return "prompt and completion"
        ways = dict.fromkeys(
            "the template's {% generation %} marks" if template.is_marked else "renderings before and after each turn"
            for template in self._templates.all.values()
        )
        return " or ".join(ways)

    def encode(self, rows: Sequence[Row | RowError]) -> list[list[Encoded] | RowError]:
        """Encode rows: each gives one example, several where its template rewrites earlier turns, or a reason why not.

        Raises:
            UserError: the tokenizer lacks what the rows need.
        """
        prepared: list[tuple[Row, list[Rendered], dict[int, float], set[str]] | RowError] = []
        with can_be_interrupted():
            for row in rows:
                try:
                    if isinstance(row, RowError):
                        raise row
                    weights = self._weights(row) if isinstance(row, Conversation) else {}
                    texts, unread = self._render(row, weights)
                    if len(texts) > 1 and self.train_on == "all":
                        raise RowError(
                            "the template rewrites earlier turns, so that no one text has all of them, and train_on "
                            "all would train some twice; use train_on=assistant"
                        )
                    prepared.append((row, texts, weights, unread))
                except RowError as error:
                    prepared.append(error)
        good = [one for one in prepared if not isinstance(one, RowError)]
        documents = [text.text for row, texts, *_ in good if isinstance(row, Document) for text in texts]
        chats = [text.text for row, texts, *_ in good if isinstance(row, Conversation) for text in texts]
        of_documents = iter(self.tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=True))
        of_chats = iter(self._segments(chats) if self._segments is not None else [])
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
                    encoded = [self._encode_document(row, next(of_documents), tally)]
                else:
                    pairs = [(text, next(of_chats)) for text in texts]
                    encoded = [self._encode_chat(row, weights, text, encoding, tally) for text, encoding in pairs]
                if not all(example.mask[1:].any() for example in encoded):  # the first token is never predicted
                    raise RowError("nothing to train on; every token is context")
            except RowError as error:
                results.append(error)
                continue
            if self.train_on == "all" and isinstance(row, Conversation) and 0.0 in row.weights:
                tally.notes["rows whose messages of weight 0 are trained too, by train_on all"] += 1
            for text in texts:
                tally.notes.update(text.notes)
            tally.unread.update(unread)
            self.tally.add(tally)
            results.append(encoded)
        return results

    def _render(self, row: Row, weights: dict[int, float]) -> tuple[list[Rendered], set[str]]:
        """The texts of a row, and what of it nothing reads."""
        if isinstance(row, Tokens):
            return [], {*row.unread}
        if isinstance(row, Document):
            return [Rendered(row.prompt + row.completion, {}, [])], {*row.unread}
        if self._finder is None:
            raise UserError("data.chat_template: the tokenizer has no chat template; give a Jinja file")
        texts, unread = self._finder.find(row, sorted(weights))
        return texts, unread | row.unread

    def _weights(self, row: Conversation) -> dict[int, float]:
        """Which messages are trained, and what each counts."""
        answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        weights = {}
        for i, weight in enumerate(row.weights):
            if i in answers:
                weights[i] = 1.0 if weight is None else weight
            elif weight:
                raise RowError(f"message {i} ({row.messages[i]['role']}): only assistant messages can be trained")
        trained = {i: weight for i, weight in weights.items() if weight > 0}
        if not trained:
            raise RowError("no assistant message to train on" + (", all have weight 0" if answers else ""))
        if self.train_on == "last_assistant":
            last = max(trained)
            return {last: trained[last]}
        return trained

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
            last = self._find_stop(ids, first, last, text.is_marked, i, row.messages[i], tally)
            if lost.strip() and self.train_on != "all" and self._says_nothing(ids[first:last]):
                raise RowError(
                    f"message {i}: {_ONLY_THE_STOP}; end the template's generation prompt with a whole token"
                )
            mask[first:last] = weights[i]
            num_targets += last - first
        tally.targets["assistant"] += num_targets
        elsewhere = 0
        for role, (begin, end) in text.contents:
            first, last = encoding.char_to_token(begin), encoding.char_to_token(end - 1)
            if first is not None and last is not None:
                tally.tokens[role] += last + 1 - first
                elsewhere += last + 1 - first
        tally.tokens["template"] += len(ids) - elsewhere
        if self.train_on == "all":
            tally.targets = tally.tokens.copy()
        return Encoded(np.asarray(ids, np.int32), mask)

    def _token_span(
        self, encoding: Any, rendered: Rendered, begin: int, end: int, tally: Tally
    ) -> tuple[int, int, str]:
        """Tokens of the characters ``begin … end``: as transformers counts them where the template marks its turns,
        else only those that have nothing but blanks from before; and the characters that are lost with another."""
        if end <= begin:
            return 0, 0, ""
        first, last = encoding.char_to_token(begin), encoding.char_to_token(end - 1)
        while first is None and begin < end - 1:  # characters that belong to no token, such as some blanks
            begin += 1
            first = encoding.char_to_token(begin)
        while last is None and end > begin + 1:
            end -= 1
            last = encoding.char_to_token(end - 1)
        if first is None or last is None:
            raise RowError("the tokenizer does not keep the text of a trained turn, so its tokens cannot be told")
        text, token = rendered.text, encoding.token_to_chars(first)
        if token[0] >= begin:
            return first, last + 1, ""
        if rendered.is_marked:
            tally.notes[MARKED_STRADDLING] += 1
        elif not _is_answers(text[token[0] : begin], tally):
            return first + 1, last + 1, text[begin : token[1]]
        return first, last + 1, ""

    def _find_stop(
        self, ids: list[int], first: int, end: int, is_marked: bool, i: int, message: Message, tally: Tally
    ) -> int:
        """Where a turn ends for training: after its stop token, and the blanks that a template's mark has behind it.

        A turn has to end with special tokens; whitespace may follow. The stop token is the first of them that
        generation stops at already, else the last.

        Raises:
            RowError: there is none, so the turn would never be stopped, or the answer itself has one.
        """
        at = end
        run: list[int] = []  # places of the special tokens at the end
        while at > first and (ids[at - 1] in self._special or self._is_blank(ids[at - 1])):
            at -= 1
            if ids[at] in self._special:
                run.append(at)
        if not run:
            where = "inside {% generation %}" if is_marked else "after an assistant message"
            raise RowError(
                f"message {i}: the answer does not end with a stop token; the chat template must write one {where}"
                " (a token of its own: data.added_tokens)"
            )
        stop = next((place for place in reversed(run) if ids[place] in self._stops), run[0])
        texts = self._stop_texts
        if ids[stop] not in texts:
            texts = {ids[stop]: self.tokenizer.convert_ids_to_tokens(ids[stop])} | texts
        said = json.dumps([value for name, value in message.items() if name != "role"], ensure_ascii=False)
        inside = next((text for text in texts.values() if text in said), None)
        if inside is None and (met := texts.keys() & set(ids[first:stop])):
            inside = texts[min(met)]
        if inside is not None:
            raise RowError(f"message {i}: the answer itself has the stop token {inside!r}, which would end it there")
        tally.stops[ids[stop]] += 1
        after = stop + 1
        while is_marked and after < end and self._is_blank(ids[after]):
            after += 1
        return after

    def _says_nothing(self, ids: Sequence[int]) -> bool:
        """Whether there is nothing to learn but when to stop."""
        return all(token in self._stops or self._is_blank(token) for token in ids)

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self.tokenizer.decode([token]).strip()
        return self._blank[token]

    def _encode_document(self, row: Document, encoding: Any, tally: Tally) -> Encoded:
        """Prompt and completion tokenised as one string, then the stop token.

        With ids ``[1, 10, 11]`` for the prompt ``ab`` and ``[12]`` for the completion ``c``, the stop id 2 and a
        tokenizer that puts a 1 in front: ids ``[1, 10, 11, 12, 2]``, mask ``[0, 0, 0, 1, 1]``.
        """
        if self._stop_id is None:
            raise UserError("data.stop_token: the tokenizer has no eos token to end a document with; name a token")
        ids, edge, lost = encoding.ids, len(row.prompt), ""
        if self.train_on == "all" or edge == 0:
            mask = np.ones(len(ids), np.float32)
        else:
            mask = np.asarray([float(start >= edge and end > start) for start, end in encoding.offsets], np.float32)
            for at, (start, end) in enumerate(encoding.offsets):
                if not start < edge < end:
                    continue
                if _is_answers(row.prompt[start:], tally):
                    mask[at] = 1.0
                else:
                    lost += row.completion[: end - edge]
            if lost.strip() and self._says_nothing([ids[at] for at in np.flatnonzero(mask)]):
                raise RowError(f"{_ONLY_THE_STOP}; end the prompt with a whole word")
        body = len(ids) - (ids[-1:] == [self._stop_id])  # it may end with what ends it
        stopping = self._stops.intersection(np.asarray(ids, np.int32)[:body][mask[:body] > 0].tolist())
        if found := _CHAT_MARK.search(row.completion):
            tally.notes[f"plain text with the marks of a chat ({found[0]}), of which every token is trained"] += 1
        elif stopping:
            token = self._stop_texts[min(stopping)]
            raise RowError(f"the text itself has the stop token {token!r}, which would end it there")
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:  # the text has one of its own
            ids, mask = ids[1:], mask[1:]
        if ids and ids[-1] == self._stop_id:
            mask[-1] = 1.0
        else:
            ids, mask = [*ids, self._stop_id], np.append(mask, np.float32(1.0))
        tally.stops[self._stop_id] += 1
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
        trained = np.flatnonzero(mask)
        if len(trained) and row.ids[trained[-1]] in self._special:
            tally.stops[row.ids[trained[-1]]] += 1
        else:
            tally.notes["tokenised rows whose targets do not end with a stop token"] += 1
        tally.tokens.update({"completion": len(trained), "prompt": len(row.ids) - len(trained)})
        tally.targets["completion"] += len(trained)
        return Encoded(np.asarray(row.ids, np.int32), mask)


def _is_answers(before: str, tally: Tally) -> bool:
    """Whether a token across the edge, with these characters of the prompt, is trained with the answer; it is noted.

    A blank before a word is the word's.
    """
    is_blank = not before.strip(" ")
    tally.notes[JOINED if is_blank else STRADDLING] += 1
    return is_blank


def prompt_ids(tokenizer: Any, messages: list[Message], today: str | None = None) -> list[int]:
    """Messages as the template renders them before an answer.

    Args:
        today: what a template that tells the day tells, YYYY-MM-DD; default the day it is.

    Raises:
        UserError: no chat template, or messages that it refuses.
    """
    templates = ChatTemplates.of(tokenizer, today)
    if templates is None:
        raise UserError("this model has no chat template; write plain text (--raw), or add a chat_template.jinja")
    try:
        with can_be_interrupted():
            text, _ = templates.choose(has_tools=False).render(messages, prompt=True)
    except RowError as error:
        raise UserError(str(error)) from error
    return context_ids(tokenizer, text, add_special_tokens=False)


def context_ids(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """A text to be continued, as in training: without a last blank that the tokenizer joins to the next word."""
    if text.endswith(" ") and text.strip():
        continued = [text + letter for letter in ascii_lowercase]  # small vocabularies do not join all of them
        offsets = tokenizer(continued, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        if any(start < len(text) < end for one in offsets["offset_mapping"] for start, end in one):
            text = text[:-1]
    return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
