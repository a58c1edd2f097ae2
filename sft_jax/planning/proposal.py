"""Proposes a config from the size of a model and the lengths of its data, with a reason for each value.

Learning rates and ranks follow Schulman et al. 2025, "LoRA Without Regret" (the best rate of LoRA is about ten times
that of full fine-tuning and hardly depends on the rank; small batches), Dettmers et al. 2023, "QLoRA" (2e-4 up to 13B
parameters, 1e-4 above), and Lambert et al. 2024, "Tülu 3" (few epochs on large data).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

METHODS = ("lora", "qlora", "full")
_FEW_STEPS = 100  # a run of fewer steps hardly learns
_MOST_EPOCHS = 10


@dataclass(frozen=True)
class Facts:
    """What the proposal depends on.

    Attributes:
        num_weights: parameters of the model.
        max_positions: longest sequence of the model.
        lengths: tokens of each example that was read.
        num_targets: supervised tokens of these examples.
        num_examples: examples of the data, also of those that were not read.
        num_devices: the devices that train.
    """

    num_weights: int
    max_positions: int
    lengths: np.ndarray
    num_targets: int
    num_examples: int
    num_devices: int


@dataclass(frozen=True)
class Choice:
    """The value of a config key, and the reason for it."""

    key: str
    value: Any
    reason: str


def propose(facts: Facts, method: str) -> list[Choice]:
    """Propose the keys whose best values depend on model and data.

    Args:
        method: one of :data:`METHODS`.
    """
    length, cover = _max_length(facts)
    examples_per_step = _examples_per_step(facts.num_examples)
    batch_size = _batch_size(facts, length, examples_per_step)
    per_step = batch_size * length / max(1.0, float(facts.lengths.mean()))
    steps_per_epoch = max(1, math.ceil(facts.num_examples / per_step))
    epochs, why = _epochs(facts.num_examples, steps_per_epoch)
    steps = epochs * steps_per_epoch
    return [
        *_method(facts, method),
        Choice("data.max_length", length, cover),
        Choice("optimizer.learning_rate", *_rate(facts.num_weights, method)),
        Choice("training.num_train_epochs", epochs, why),
        Choice(
            "training.batch_size",
            batch_size,
            f"sequences a step, about {per_step:,.0f} examples; {steps_per_epoch:,} steps an epoch",
        ),
        Choice("training.eval_every", _round(steps / 10), "ten times in the run"),
        Choice("training.save_every", _round(steps / 5), "five times in the run; a resume repeats what came after"),
    ]


def _method(facts: Facts, method: str) -> list[Choice]:
    if method == "full":
        return [Choice("lora", None, "full fine-tuning")]
    targets = facts.num_targets * facts.num_examples / max(1, len(facts.lengths))
    rank = 16 if targets < 1e6 else 32 if targets < 1e7 else 64
    kept = [
        Choice("lora.rank", rank, f"for about {_short(targets)} supervised tokens; more data can use a higher rank"),
        Choice("lora.alpha", 2 * rank, "twice the rank, so that the rate fits any rank"),
    ]
    return (
        [Choice("model.quantization", "nf4", "QLoRA: the frozen base in 4 bits"), *kept] if method == "qlora" else kept
    )


def _short(number: float) -> str:
    """Two digits of a large number: ``940,000``."""
    power = 10 ** max(0, math.floor(math.log10(max(number, 1))) - 1)
    return f"{round(number / power) * power:,}"


def _max_length(facts: Facts) -> tuple[int, str]:
    """The sequence length, a multiple of 128, and how many examples it covers."""
    lengths = np.sort(facts.lengths)
    longest, usual = int(lengths[-1]), int(np.quantile(lengths, 0.99))
    wanted = longest if longest <= 3 * usual else int(np.quantile(lengths, 0.995))
    wanted = max(wanted, 4 * int(np.median(lengths)))  # packing fills sequences that hold several examples
    length = min(128 * math.ceil(wanted / 128), facts.max_positions)
    left_out = int((lengths > length).sum())
    cover = f"the longest example has {longest:,} tokens, the median {int(np.median(lengths)):,}"
    if left_out:
        cover += f"; {left_out:,} of {len(lengths):,} are longer and dropped"
    return length, cover


def _examples_per_step(num_examples: int) -> int:
    return next((size for size, limit in ((16, 2_000), (32, 20_000), (64, 200_000)) if num_examples < limit), 128)


def _batch_size(facts: Facts, length: int, examples: int) -> int:
    """Sequences per step: a power of two of them for each device."""
    sequences = examples * float(facts.lengths.mean()) / length
    per_device = max(1.0, sequences / facts.num_devices)
    return facts.num_devices * 2 ** round(math.log2(per_device))


def _epochs(num_examples: int, steps_per_epoch: int) -> tuple[int, str]:
    epochs = 3 if num_examples < 20_000 else 2 if num_examples < 100_000 else 1
    if epochs * steps_per_epoch < _FEW_STEPS:
        epochs = min(_MOST_EPOCHS, math.ceil(_FEW_STEPS / steps_per_epoch))
        return epochs, f"few examples, so several epochs: {epochs * steps_per_epoch:,} steps"
    return epochs, f"{epochs * steps_per_epoch:,} steps"


def _rate(num_weights: int, method: str) -> tuple[float, str]:
    if method == "full":
        return (2.0e-5 if num_weights < 3e9 else 1.0e-5), "full fine-tuning needs about a tenth of the rate of LoRA"
    return (2.0e-4 if num_weights < 2e10 else 1.0e-4), "the usual rate of LoRA at this size"


def _round(steps: float) -> int:
    """A round number of steps: 1, 2 or 5 times a power of ten.

    >>> [_round(x) for x in (0.4, 7, 34, 160)]
    [1, 5, 50, 200]
    """
    if steps <= 1:
        return 1
    power = 10 ** math.floor(math.log10(steps))
    return min((power * factor for factor in (1, 2, 5, 10)), key=lambda one: abs(math.log(one / steps)))
