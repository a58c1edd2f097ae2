"""Generates conversations of given lengths in tokens: random words, the same in each run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

KINDS = ("short", "long")
SHORT_MEAN, SHORT_SPREAD = 150.0, 0.4  # tokens of a GSM8K example, and the deviation of their logarithm
_SHORTEST, _LONGEST_SHORT = 24, 500
_FILLER = "a"  # a word of one token, for the last tokens of a document
_SYLLABLES = [a + b for a, b in itertools.product("bdfgklmnprstv", "aeiou")]


@cache
def words() -> tuple[str, ...]:
    """Two thousand words of one to three syllables; the first ones are the most frequent.

    >>> words()[:4], len(words())
    (('a', 'ba', 'be', 'bi'), 2000)
    """
    pairs = ("".join(pair) for pair in itertools.product(_SYLLABLES, repeat=2))
    triples = ("".join(three) for three in itertools.product(_SYLLABLES, repeat=3))
    some = itertools.chain(_SYLLABLES, itertools.islice(pairs, 0, None, 4), triples)
    return (_FILLER, *itertools.islice(some, 1999))


def draw_words(rng: np.random.Generator, number: int) -> np.ndarray:
    """Indices into :func:`words` by Zipf's law."""
    share = 1.0 / np.arange(1, len(words()) + 1)
    return rng.choice(len(share), number, p=share / share.sum())


def texts_for_a_tokenizer() -> list[str]:
    """Texts to train a tokenizer on that reads each word of :func:`words` as few tokens."""
    known = words()
    drawn = [known[i] for i in draw_words(np.random.default_rng(0), 50_000)]
    return [" ".join(drawn[i : i + 100]) for i in range(0, len(drawn), 100)]


def lengths_of(kind: str, sequence_length: int, number: int) -> np.ndarray:
    """Lengths of documents in tokens: ``short`` as in GSM8K, log-normal; ``long`` fills a sequence.

    >>> int(lengths_of("long", 4096, 3).min()), round(float(lengths_of("short", 2048, 2000).mean()), -1)
    (4096, 150.0)
    """
    if kind == "long":
        return np.full(number, sequence_length)
    drawn = np.random.default_rng(1).lognormal(np.log(SHORT_MEAN) - SHORT_SPREAD**2 / 2, SHORT_SPREAD, number)
    return np.clip(np.rint(drawn), _SHORTEST, min(_LONGEST_SHORT, sequence_length)).astype(int)


def conversations(lengths: Sequence[int], tokenizer: Any) -> list[list[dict[str, str]]]:
    """Conversations of a question and an answer whose chat template gives ``lengths`` tokens, one after the other.

    A third of the words are the question, about as in GSM8K.

    Raises:
        ValueError: a length that the chat template alone exceeds.
    """
    rng, known, count = np.random.default_rng(2), words(), _counter(tokenizer)
    inside = np.asarray([count(f" {word}") for word in known])  # tokens of a word after another
    if inside[0] != 1:
        raise ValueError(f"the tokenizer reads {_FILLER!r} as {inside[0]} tokens")
    messages = messages_of(_FILLER, _FILLER)
    least = len(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])
    made = []
    for length in lengths:
        if length < least:
            raise ValueError(f"a conversation has at least {least} tokens, not {length}")
        drawn = draw_words(rng, int(length))
        used = int(np.searchsorted(np.cumsum(inside[drawn]), length - least, side="right"))
        fill = int(length - least - inside[drawn[:used]].sum())
        text = [known[i] for i in drawn[:used]] + [_FILLER] * fill
        cut = len(text) // 3
        # Both begin with the filler, which ``least`` counts: a first word can have other tokens than a later one.
        made.append(messages_of(" ".join([_FILLER, *text[:cut]]), " ".join([_FILLER, *text[cut:]])))
    return made


def _counter(tokenizer: Any) -> Callable[[str], int]:
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def messages_of(question: str, answer: str) -> list[dict[str, str]]:
    """A conversation of a question and an answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
