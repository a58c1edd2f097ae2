"""Tokenising texts by the segments between their special tokens, each different segment once.

A tokenizer splits a text at special tokens before it does anything else, so what is between two of them has the same
ids in any text. Conversations are full of segments met before: system prompts, tool schemas, the history of a
conversation that is trained turn by turn, one question with several answers.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_KEPT_TOKENS = 1 << 22  # of all segments that are remembered
_TRIED = 64  # texts that are also tokenised whole, to be sure
# Parts of a tokenizer that treat a segment alike wherever it stands.
_ALIKE = {"Split", "ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "Sequence", None}


class TokenisedText(Protocol):
    """One text as tokens: what ``tokenizers.Encoding`` offers, as far as it is used here."""

    @property
    def ids(self) -> list[int]:
        """Its tokens."""
        ...

    def char_to_token(self, char: int) -> int | None:
        """Which token a character is in, the first if several; None if in none."""
        ...

    def token_to_chars(self, token: int) -> tuple[int, int] | None:
        """Which characters a token stands for."""
        ...


@dataclass(frozen=True)
class Segment:
    """A segment to be remembered: its tokens and the characters they stand for, counted from its start."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def char_to_token(self, char: int) -> int | None:
        """Which token a character is in, the first if several; None if in none."""
        token = bisect_right(self.ends, char)
        return None if token == len(self.ids) or self.starts[token] > char else token

    def token_to_chars(self, token: int) -> tuple[int, int] | None:
        """Which characters a token stands for."""
        return self.starts[token], self.ends[token]


class Joined:
    """A text as its segments."""

    def __init__(self, segments: Sequence[TokenisedText], sizes: Sequence[int]):
        self.ids: list[int] = []
        self._segments, self._chars, self._tokens = segments, [], []
        at = 0
        for segment, size in zip(segments, sizes, strict=True):
            self._chars.append(at)
            self._tokens.append(len(self.ids))
            self.ids += segment.ids
            at += size

    def char_to_token(self, char: int) -> int | None:
        """Which token a character is in, the first if several; None if in none."""
        i = bisect_right(self._chars, char) - 1
        token = self._segments[i].char_to_token(char - self._chars[i])
        return None if token is None else self._tokens[i] + token

    def token_to_chars(self, token: int) -> tuple[int, int] | None:
        """Which characters a token stands for."""
        i = bisect_right(self._tokens, token) - 1  # the last of several that start there: those before have no tokens
        found = self._segments[i].token_to_chars(token - self._tokens[i])
        return None if found is None else (self._chars[i] + found[0], self._chars[i] + found[1])


class SegmentEncoder:
    """``encode_batch`` without special tokens of its own, by segments where the tokenizer allows it.

    Args:
        tokenizer: a fast transformers tokenizer.
        template: the chat template, whose special tokens are where texts are split.
    """

    def __init__(self, tokenizer: Any, template: str):
        self._backend = tokenizer.backend_tokenizer
        self._kept: dict[str, Segment] = {}
        self._met: set[int] = set()
        self._num_tokens = 0
        self._num_tried = 0
        special = _split_at(tokenizer, template) if _is_position_free(self._backend) else {}
        self._special = {text: Segment([token], [0], [len(text)]) for text, token in special.items()}
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(longest_first)})") if special else None

    @property
    def splits(self) -> bool:
        """Whether texts are split at all."""
        return self._pattern is not None

    def __call__(self, texts: Sequence[str]) -> Sequence[TokenisedText]:
        """The tokens of each text."""
        if self._pattern is None:
            return self._backend.encode_batch(texts, add_special_tokens=False)
        kept = self._kept
        split = [[part for part in self._pattern.split(text) if part] for text in texts]
        new = {part: None for parts in split for part in parts if part not in self._special and part not in kept}
        fresh = dict(zip(new, self._backend.encode_batch(list(new), add_special_tokens=False), strict=True))
        joined = []
        for parts in split:
            segments = [self._special.get(part) or kept.get(part) or fresh[part] for part in parts]
            joined.append(Joined(segments, list(map(len, parts))))
        self._remember(fresh)
        if self._num_tried < _TRIED:
            tried = range(min(_TRIED - self._num_tried, len(texts)))
            self._num_tried += len(tried)
            whole = self._backend.encode_batch([texts[i] for i in tried], add_special_tokens=False)
            if any(whole[i].ids != joined[i].ids for i in tried):
                self._pattern = None  # a kind of tokenizer that was not thought of: whole texts from here on
                return self(texts)
        return joined

    def _remember(self, fresh: dict[str, Any]) -> None:
        """Keep the segments that have been met before; of others, only that they have."""
        if self._num_tokens > _KEPT_TOKENS:
            self._kept = {}  # another one: threads may still read the old
            self._num_tokens = 0
        if len(self._met) > _KEPT_TOKENS:
            self._met = set()
        for part, encoding in fresh.items():
            met = hash(part)
            if met in self._met:
                offsets = encoding.offsets
                self._kept[part] = Segment(encoding.ids, [start for start, _ in offsets], [end for _, end in offsets])
                self._num_tokens += len(offsets)
            self._met.add(met)


def _is_position_free(backend: Any) -> bool:
    """Whether a segment's tokens do not depend on where in a text it stands."""
    waiting = [_settings(backend.pre_tokenizer)]
    while waiting:
        part = waiting.pop() or {}
        if part.get("type") not in _ALIKE or part.get("add_prefix_space"):
            return False
        waiting += part.get("pretokenizers", [])
    waiting = [_settings(backend.post_processor)]
    while waiting:  # trims offsets, and otherwise at the start of a text only
        part = waiting.pop() or {}
        if part.get("type") == "ByteLevel" and part.get("add_prefix_space") and part.get("trim_offsets"):
            return False
        waiting += part.get("processors", [])
    return True


def _settings(part: Any) -> dict[str, Any] | None:
    """What a part of a tokenizer is made with: the JSON that it is pickled as (the vocabulary is not among it)."""
    return None if part is None else json.loads(part.__getstate__())


def _split_at(tokenizer: Any, template: str) -> dict[str, int]:
    """Special tokens of a template that are told in any text, whatever stands around them."""
    added = {str(token): (i, token) for i, token in tokenizer.added_tokens_decoder.items()}
    found = {}
    for text, (i, token) in added.items():
        plain = token.special and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        if plain and text in template and not any(_overlap(text, other) for other in added if other != text):
            found[text] = i
    return found


def _overlap(a: str, b: str) -> bool:
    """Whether two texts can share characters where both stand in a text."""
    shorter = min(len(a), len(b))
    return a in b or b in a or any(a[-n:] == b[:n] or b[-n:] == a[:n] for n in range(1, shorter))
