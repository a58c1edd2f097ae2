"""Stop tokens: which ones generation stops at, and where a supervised turn ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sft_jax.data.read.rows import Message, RowError
from sft_jax.errors import UserError


class StopTokens:
    """The stop tokens and special tokens of one tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer.
        stop_token: the token that ends a completion or a document; default the tokenizer's EOS token.
        stop_ids: ids that generation already stops at.

    Raises:
        UserError: the tokenizer has no token ``stop_token``.
    """

    def __init__(self, tokenizer: Any, stop_token: str | None, stop_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self.default: int | None = tokenizer.eos_token_id
        if stop_token is not None:
            self.default = tokenizer.convert_tokens_to_ids(stop_token)
            if self.default is None or self.default == tokenizer.unk_token_id:
                raise UserError(
                    f"data.stop_token: the tokenizer has no token {stop_token!r}; add it to data.added_tokens"
                )
        self.ids = {*stop_ids, *([] if self.default is None else [self.default])}
        self.special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | self.ids
        named = {i: tokenizer.convert_ids_to_tokens(i) for i in self.ids}
        # A generation config may name ids that the tokenizer does not have.
        self.texts: dict[int, str] = {i: text for i, text in named.items() if text is not None}
        self._whitespace: dict[int, bool] = {}

    def find_end(
        self, ids: list[int], first: int, end: int, is_marked: bool, i: int, message: Message
    ) -> tuple[int, int]:
        """Find where the supervised tokens of a turn end.

        A turn has to end with special tokens; whitespace may follow. The stop token is the first of them that
        generation already stops at, else the last.

        Args:
            ids: of the whole text; the turn is ``ids[first:end]``.
            is_marked: whether the turn is a ``{% generation %}`` block; whitespace after its stop token is supervised.
            i: number of the message.

        Returns:
            The end of the supervised tokens, and the id of the stop token.

        Raises:
            RowError: the turn does not end with a stop token, or the answer contains one.
        """
        at = end
        trailing: list[int] = []  # positions of the special tokens at the end, last first
        while at > first and (ids[at - 1] in self.special or self.is_whitespace(ids[at - 1])):
            at -= 1
            if ids[at] in self.special:
                trailing.append(at)
        if not trailing:
            where = "inside {% generation %}" if is_marked else "after an assistant message"
            raise RowError(
                f"message {i}: the answer does not end with a stop token; the chat template must write one {where}"
                " (define a new token with data.added_tokens)"
            )
        stop = next((position for position in reversed(trailing) if ids[position] in self.ids), trailing[0])
        texts = self.texts
        if ids[stop] not in texts:
            texts = {ids[stop]: self._tokenizer.convert_ids_to_tokens(ids[stop])} | texts
        content = json.dumps([value for name, value in message.items() if name != "role"], ensure_ascii=False)
        inside = next((text for text in texts.values() if text in content), None)
        if inside is None and (stops_inside := texts.keys() & set(ids[first:stop])):
            inside = texts[min(stops_inside)]
        if inside is not None:
            raise RowError(f"message {i}: the answer contains the stop token {inside!r}, at which generation would end")
        after = stop + 1
        while is_marked and after < end and self.is_whitespace(ids[after]):
            after += 1
        return after, ids[stop]

    def all_stop_or_whitespace(self, ids: Sequence[int]) -> bool:
        """Whether the tokens contain no text, only stop tokens and whitespace."""
        return all(token in self.ids or self.is_whitespace(token) for token in ids)

    def is_whitespace(self, token: int) -> bool:
        """Whether a token decodes to whitespace or to nothing."""
        if token not in self._whitespace:
            self._whitespace[token] = not self._tokenizer.decode([token]).strip()
        return self._whitespace[token]
