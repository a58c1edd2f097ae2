"""Computes and compares the logits and the greedy continuation of a few fixed texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sft_jax.assembly import Model
from sft_jax.checking.result import Result, verdict
from sft_jax.errors import UserError
from sft_jax.inference.generator import Generator
from sft_jax.models.architecture import Architecture

TOLERANCE = 1e-3
NEW_TOKENS = 16
_LONGEST = 544  # tokens of a text that is made longer than the sliding window
_BEYOND_WINDOW = 32

TEXTS = (
    "The Danube flows through ten countries on its way from the Black Forest to the Black Sea.",
    "def area(radius):\n    return 3.14159 * radius ** 2  # 2 + 2 = 4\n",
    "Ünïcode: 東京, Київ, ≥ 90 %",
)


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference of logits, and the largest absolute logit of the reference.

    Logits agree if they differ by at most ``TOLERANCE · max(1, largest logit)``: both sides are float32, so a right
    network differs by rounding, which grows with depth and with the size of the logits, and was 1e-6 of the largest
    logit for builtin:tiny. NaN never agrees.
    """

    largest: float
    largest_logit: float

    @property
    def limit(self) -> float:
        """The largest difference with which logits agree."""
        return TOLERANCE * max(1.0, self.largest_logit)

    @property
    def agrees(self) -> bool:
        return self.largest <= self.limit

    @property
    def numbers(self) -> dict[str, float]:
        return {"largest_difference": self.largest, "largest_logit": self.largest_logit}

    def __str__(self) -> str:
        relation = "at most" if self.agrees else "more than"
        return (
            f"largest difference {self.largest:.2g}, {relation} {self.limit:.2g}; largest |logit| "
            f"{self.largest_logit:.4g}"
        )


def difference(ours: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> Difference:
    """Compares the logits ``[T, V]`` of several texts; other shapes differ infinitely.

    >>> difference([np.array([[1.0, 2.5]])], [np.array([[1.0, 2.0]])])
    Difference(largest=0.5, largest_logit=2.0)
    """
    largest = largest_logit = 0.0
    for one, other in zip(ours, reference, strict=True):
        if one.shape != other.shape:
            return Difference(float("inf"), float(np.abs(other).max()))
        # np.maximum keeps NaN, which max() may lose
        largest = float(np.maximum(largest, np.abs(one - other).max()))
        largest_logit = float(np.maximum(largest_logit, np.abs(other).max()))
    return Difference(largest, largest_logit)


def sample_ids(tokenizer: Any, arch: Architecture) -> list[list[int]]:
    """Token ids of the texts, and of a longer one if a sliding window is short enough to be passed.

    Raises:
        UserError: a token id that the embeddings do not have.
    """
    limit = arch.max_positions - NEW_TOKENS
    texts = [tokenizer(text)["input_ids"][: limit // 2] for text in TEXTS]
    largest = max(max(ids) for ids in texts)
    if largest >= arch.vocab_size:
        raise UserError(f"the tokenizer writes token id {largest}, and there are only {arch.vocab_size} embeddings")
    if (window := _smallest_window(arch)) is not None and window + _BEYOND_WINDOW <= min(limit, _LONGEST):
        together = [token for ids in texts for token in ids]
        length = window + _BEYOND_WINDOW
        texts.append((together * (length // len(together) + 1))[:length])
    return texts


def untested(arch: Architecture, texts: Sequence[Sequence[int]]) -> str:
    """What the texts are too short for; empty if nothing."""
    window = _smallest_window(arch)
    if window is None or window < max(map(len, texts)):
        return ""
    return f"; not reached: the sliding window of {window:,} tokens"


@dataclass(frozen=True)
class Measured:
    """What our network computes for the texts.

    Attributes:
        logits: ``[T, V]`` of each text.
        packed: ``[T, V]`` of the first two texts packed in one sequence.
        generated: the greedy continuation of the first text with a cache; no token stops it.
        continued: ``[generated, V]``, the logits that predict ``generated``, without a cache.
    """

    logits: list[np.ndarray]
    packed: np.ndarray
    generated: list[int]
    continued: np.ndarray


def measure(model: Model, texts: Sequence[Sequence[int]]) -> Measured:
    """Run all of :class:`Measured`; the texts are separate sequences of one batch."""
    generator = Generator(model.split, stop_ids=())
    (answer,) = generator(model.params, model.frozen, [texts[0]], NEW_TOKENS)
    packed = [*texts[0], *texts[1]]
    segments = [1] * len(texts[0]) + [2] * len(texts[1])
    positions = [*range(len(texts[0])), *range(len(texts[1]))]
    continued = [*texts[0], *answer.ids]
    rows = [(ids, [1] * len(ids), list(range(len(ids)))) for ids in (*texts, continued)]
    *apart, last, both = _logits(model, [*rows, (packed, segments, positions)])
    return Measured(apart, both, answer.ids, last[len(texts[0]) - 1 : -1])


def logits(model: Model, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Logits ``[T, V]`` (float32) of each text."""
    return _logits(model, [(ids, [1] * len(ids), list(range(len(ids)))) for ids in texts])


def check_packed(ours: Measured) -> Result:
    """Whether two texts packed in one sequence have the logits that each has alone."""
    found = difference([ours.packed], [np.concatenate(ours.logits[:2])])
    details = f"two texts in one sequence beside each alone: {found}"
    return Result("packed", verdict(found.agrees), details, found.numbers)


def check_greedy(ours: Measured, theirs: Sequence[int] | None, other: str) -> Result:
    """Whether the greedy continuation with a cache is that without a cache, and that of another library.

    Where two tokens are as likely as each other up to :class:`Difference`'s criterion, either may follow.

    Args:
        theirs: the other library's tokens; None if it is not there.
        other: the name of the library, or why it is not there.
    """
    chosen = zip(ours.generated, ours.continued, strict=True)
    wrong = next((i for i, (token, row) in enumerate(chosen) if not _is_likeliest(row, token, 1)), None)
    details = f"{len(ours.generated)} tokens with a cache: "
    details += "the same without a cache" if wrong is None else f"without a cache, token {wrong + 1} is another"
    same = True
    if theirs is None:
        details += f"; not compared with another library: {other}"
    elif list(theirs) == ours.generated:
        details += f", the same by {other}"
    elif len(theirs) != len(ours.generated):
        details, same = f"{details}; {len(theirs)} tokens by {other}", False
    else:
        pairs = zip(ours.generated, theirs, strict=True)
        at = next(i for i, (one, another) in enumerate(pairs) if one != another)
        same = _is_likeliest(ours.continued[at], theirs[at], 2)  # both sides may be off
        details += f"; by {other}, token {at + 1} is another, {'as likely as ours' if same else 'less likely'}"
    return Result("greedy text", verdict(wrong is None and same), details)


def _logits(model: Model, rows: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
    """Logits of sequences, each with its token ids, segment ids and positions, padded to one batch."""
    length = max(len(ids) for ids, _, _ in rows)
    inputs, segments, positions = (np.zeros((len(rows), length), np.int32) for _ in range(3))
    for i, row in enumerate(rows):
        for array, values in zip((inputs, segments, positions), row, strict=True):
            array[i, : len(values)] = values
    forward = jax.jit(lambda params, frozen, *batch: model.split.merge(params, frozen)(*batch))
    hidden = forward(model.params, model.frozen, inputs, segments, positions)
    project = jax.jit(lambda params, frozen, hidden: model.split.merge(params, frozen).logits(hidden))
    # One sequence at a time: the logits of all of them are large.
    return [np.asarray(project(model.params, model.frozen, hidden[i]))[: len(row[0])] for i, row in enumerate(rows)]


def _smallest_window(arch: Architecture) -> int | None:
    return min((spec.window for spec in arch.attention_specs if spec.window is not None), default=None)


def _is_likeliest(row: np.ndarray, token: int, limits: int) -> bool:
    """Whether no logit of a row is higher than that of a token by more than a number of limits."""
    return bool(row.max() - row[token] <= limits * Difference(0.0, float(np.abs(row).max())).limit)


def needed_bytes(num_params: int, arch: Architecture, texts: Sequence[Sequence[int]], copies: int = 1) -> float:
    """An estimate of the memory for the comparison in float32: weights, logits of both sides, and 1.5 GB for torch.

    Args:
        copies: how many times the weights are in memory at a time.
    """
    tokens = 2 * sum(map(len, texts)) + NEW_TOKENS
    return 4.4 * num_params * copies + 3 * 4 * tokens * arch.vocab_size + 1.5e9
