"""Tokenizes texts by the segments between their special tokens, and caches repeated segments.

A tokenizer first splits a text at special tokens, so a segment between two of them has the same ids in any text.
Many segments repeat: system prompts, tool schemas, the history of a conversation that is split into several examples,
and a question with several answers.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from sft_jax.data.read.limits import TEXT_BYTES
from sft_jax.data.read.rows import RowError

_MAX_CACHED_TOKENS = 1 << 22  # of all cached segments
_LONG = 1 << 19  # characters of texts that are not split, and of those that are checked at a time, to save memory
_NUM_CHECKED = 64  # texts that are also tokenized as a whole, to verify that both ways agree
# Tokenizer components whose output does not depend on the position of a segment.
_POSITION_FREE = {"Split", "ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "Sequence", None}


class TokenizedText(Protocol):
    """The tokens of one text; the subset of ``tokenizers.Encoding`` that is used here."""

    @property
    def ids(self) -> list[int]:
        """Token ids."""
        ...

    def char_to_token(self, char: int) -> int | None:
        """Return the first token that contains a character; None if there is none."""
        ...

    def token_to_chars(self, token: int) -> tuple[int, int] | None:
        """Return the character span of a token."""
        ...


@dataclass(frozen=True)
class Segment:
    """The tokens of a cached segment, and their character spans relative to the start of the segment."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def char_to_token(self, char: int) -> int | None:
        """Return the first token that contains a character; None if there is none."""
        token = bisect_right(self.ends, char)
        return None if token == len(self.ids) or self.starts[token] > char else token

    def token_to_chars(self, token: int) -> tuple[int, int] | None:
        """Return the character span of a token."""
        return self.starts[token], self.ends[token]


class Joined:
    """The tokens of a text, joined from its segments."""

    def __init__(self, segments: Sequence[TokenizedText], sizes: Sequence[int]):
        self.ids: list[int] = []
        self._segments, self._chars, self._tokens = segments, [], []
        at = 0
        for segment, size in zip(segments, sizes, strict=True):
            self._chars.append(at)
            self._tokens.append(len(self.ids))
            self.ids += segment.ids
            at += size

    def char_to_token(self, char: int) -> int | None:
        """Return the first token that contains a character; None if there is none."""
        i = bisect_right(self._chars, char) - 1
        token = self._segments[i].char_to_token(char - self._chars[i])
        return None if token is None else self._tokens[i] + token

    def token_to_chars(self, token: int) -> tuple[int, int] | None:
        """Return the character span of a token."""
        i = bisect_right(self._tokens, token) - 1  # of several segments that start here, only the last has tokens
        span = self._segments[i].token_to_chars(token - self._tokens[i])
        return None if span is None else (self._chars[i] + span[0], self._chars[i] + span[1])


class SegmentEncoder:
    """Same as ``encode_batch(texts, add_special_tokens=False)``, but by segments if the tokenizer allows it.

    Args:
        tokenizer: a fast transformers tokenizer.
        template: source of the chat template; texts are split at its special tokens.
    """

    def __init__(self, tokenizer: Any, template: str):
        self._backend = tokenizer.backend_tokenizer
        self._cache: dict[str, Segment] = {}
        self._seen: set[int] = set()
        self._num_tokens = 0
        self._num_checked = 0
        special = _split_at(tokenizer, template) if _is_position_free(self._backend) else {}
        self._special = {text: Segment([token], [0], [len(text)]) for text, token in special.items()}
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(longest_first)})") if special else None

    @property
    def splits(self) -> bool:
        """Whether texts are split into segments."""
        return self._pattern is not None

    def __call__(self, texts: Sequence[str]) -> Sequence[TokenizedText]:
        """Tokenize each text."""
        if self._pattern is None or any(len(text) > _LONG for text in texts):
            return self._backend.encode_batch(texts, add_special_tokens=False)
        cache = self._cache
        split = [[part for part in self._pattern.split(text) if part] for text in texts]
        new = {part: None for parts in split for part in parts if part not in self._special and part not in cache}
        encoded = dict(zip(new, self._backend.encode_batch(list(new), add_special_tokens=False), strict=True))
        joined = []
        for parts in split:
            segments = [self._special.get(part) or cache.get(part) or encoded[part] for part in parts]
            joined.append(Joined(segments, list(map(len, parts))))
        self._update_cache(encoded)
        if self._num_checked < _NUM_CHECKED:
            sizes = accumulate(map(len, texts))
            checked = [i for i, size in enumerate(sizes) if i < _NUM_CHECKED - self._num_checked and size <= _LONG]
            self._num_checked += len(checked)
            whole = self._backend.encode_batch([texts[i] for i in checked], add_special_tokens=False)
            if any(whole[i].ids != joined[i].ids for i in checked):
                self._pattern = None  # segments depend on their position after all: tokenize whole texts from now on
                return self(texts)
        return joined

    def _update_cache(self, encoded: dict[str, Any]) -> None:
        """Cache the segments that have been seen before; of new segments, keep only the hash."""
        if self._num_tokens > _MAX_CACHED_TOKENS:
            self._cache = {}  # a new dict, because other threads may still read the old one
            self._num_tokens = 0
        if len(self._seen) > _MAX_CACHED_TOKENS:
            self._seen = set()
        for part, encoding in encoded.items():
            key = hash(part)
            if key in self._seen:
                offsets = encoding.offsets
                self._cache[part] = Segment(encoding.ids, [start for start, _ in offsets], [end for _, end in offsets])
                self._num_tokens += len(offsets)
            self._seen.add(key)


def refuse_long(num_bytes: int) -> None:
    """Refuse a text before it is tokenized: offsets and other records of each token need up to 340 times its memory.

    Raises:
        RowError: it is longer than the limit.
    """
    if num_bytes > TEXT_BYTES:
        raise RowError(
            f"has a text of {num_bytes / 2**20:.1f} MB, more than {TEXT_BYTES / 2**20:.1f} MB; split it, or leave such "
            "rows out with data.on_bad_row: skip"
        )


def _is_position_free(backend: Any) -> bool:
    """Whether the tokens of a segment do not depend on its position in a text."""
    remaining = [_settings(backend.pre_tokenizer)]
    while remaining:
        component = remaining.pop() or {}
        if component.get("type") not in _POSITION_FREE or component.get("add_prefix_space"):
            return False
        remaining += component.get("pretokenizers", [])
    remaining = [_settings(backend.post_processor)]
    while remaining:  # with add_prefix_space, ByteLevel trims offsets differently at the start of a text
        component = remaining.pop() or {}
        if component.get("type") == "ByteLevel" and component.get("add_prefix_space") and component.get("trim_offsets"):
            return False
        remaining += component.get("processors", [])
    return True


def _settings(component: Any) -> dict[str, Any] | None:
    """Return the settings of a tokenizer component, from the JSON of its pickle state (without the vocabulary)."""
    return None if component is None else json.loads(component.__getstate__())


def _split_at(tokenizer: Any, template: str) -> dict[str, int]:
    """Return the special tokens of a template that the tokenizer recognizes in any context."""
    added = {str(token): (i, token) for i, token in tokenizer.added_tokens_decoder.items()}
    special = {}
    for text, (i, token) in added.items():
        plain = token.special and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        if plain and text in template and not any(_overlap(text, other) for other in added if other != text):
            special[text] = i
    return special


def _overlap(a: str, b: str) -> bool:
    """Whether occurrences of two texts can overlap."""
    shorter = min(len(a), len(b))
    return a in b or b in a or any(a[-n:] == b[:n] or b[-n:] == a[:n] for n in range(1, shorter))
