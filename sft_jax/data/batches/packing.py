"""Plans a run: packs examples into sequences, and assigns sequences to steps.

A plan depends only on the lengths of the examples and a seed. So the number of steps is known in advance, any step can
be built without the steps before it, and global batches do not depend on the number of hosts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sft_jax.config import DataConfig, TrainingConfig
from sft_jax.data.tokens.examples import Examples
from sft_jax.errors import UserError

WINDOW = 8192  # examples that are sorted by length and packed together
_MIN_PER_EPOCH = 1e-3  # examples; fewer make a plan of some steps go through epochs almost without end
_MAX_ITEMS = 200_000_000  # examples of a plan, which is held in memory
MAX_BUCKETS = 5  # sequence lengths of a run without packing; the step is compiled for each of them
SIMILAR_STEPS = 32  # without packing, examples are sorted by length within this many steps


@dataclass(frozen=True)
class Plan:
    """The examples of each sequence and the sequences of each step, as flat arrays.

    Sequence ``r`` holds the examples ``items[rows[r]:rows[r + 1]]``, and step ``s`` holds the sequences
    ``steps[s] … steps[s + 1]``. The last step of an epoch may have fewer sequences than the others.
    """

    items: np.ndarray
    rows: np.ndarray
    steps: np.ndarray
    lengths: np.ndarray  # sequence length of each step; without packing, the smallest bucket for its longest example
    epoch_ends: tuple[int, ...]  # the step after the last one of each epoch

    @property
    def num_steps(self) -> int:
        return len(self.steps) - 1

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all sequences, with padding."""
        return int((np.diff(self.steps) * self.lengths).sum())

    def rows_of(self, step: int) -> list[np.ndarray]:
        """Return the examples of each sequence of a step."""
        first, last = self.steps[step], self.steps[step + 1]
        return [self.items[self.rows[r] : self.rows[r + 1]] for r in range(first, last)]


def plan_run(
    num_tokens: np.ndarray,
    sequence_length: int,
    batch_size: int,
    num_epochs: float,
    max_steps: int | None = None,
    seed: int = 0,
    packing: bool = True,
    shuffle: bool = True,
    repeats: np.ndarray | None = None,
) -> Plan:
    """Plan all epochs. Deterministic in its arguments.

    Args:
        num_tokens: number of tokens of each example; at most ``sequence_length``.
        sequence_length: tokens per sequence, with padding.
        batch_size: sequences per step.
        num_epochs: passes over the data; a fraction ends the last epoch early.
        max_steps: number of steps; overrides ``num_epochs``.
        repeats: how often an epoch contains each example (default once); fractions are rounded up or down at random in
            each epoch.
    """
    assert len(num_tokens) > 0
    assert int(num_tokens.max()) <= sequence_length
    items, sequence_sizes, step_sizes, epoch_ends = [], [], [], []
    epoch = 0
    while len(step_sizes) < max_steps if max_steps is not None else epoch < num_epochs:
        rng = np.random.default_rng([seed, epoch])
        order = _occurrences(len(num_tokens), repeats, rng)
        if shuffle:
            rng.shuffle(order)
        if packing:
            sequences = pack(num_tokens, order, sequence_length, shuffle)
            sequences = [sequences[i] for i in rng.permutation(len(sequences))] if shuffle else sequences
        else:
            order = group_by_length(num_tokens, order, batch_size, rng) if shuffle else order
            sequences = [order[i : i + 1] for i in range(len(order))]
        sizes = [min(batch_size, len(sequences) - i) for i in range(0, len(sequences), batch_size)]
        if max_steps is not None:
            sizes = sizes[: max_steps - len(step_sizes)]
        elif num_epochs - epoch < 1:
            sizes = sizes[: max(1, round(len(sizes) * (num_epochs - epoch)))]
        sequences = sequences[: sum(sizes)]
        items += sequences
        sequence_sizes += [len(sequence) for sequence in sequences]
        step_sizes += sizes
        epoch_ends.append(len(step_sizes))
        epoch += 1
    steps = _offsets(step_sizes)
    flat = np.concatenate(items) if items else np.zeros(0, np.int64)
    lengths = np.full(len(step_sizes), sequence_length)
    if not packing and len(flat):
        sizes = np.asarray(buckets(sequence_length))
        lengths = sizes[np.searchsorted(sizes, np.maximum.reduceat(num_tokens[flat], steps[:-1]))]
    return Plan(flat, _offsets(sequence_sizes), steps, lengths, tuple(epoch_ends))


def plan_of(data: DataConfig, training: TrainingConfig, examples: Examples) -> Plan:
    """Plan the run of a config."""
    repeats = None
    if any(weight != 1.0 for weight in examples.weights):
        repeats = np.asarray(examples.weights)[examples.source]
    per_epoch = float(len(examples) if repeats is None else repeats.sum())
    if training.max_steps is not None and per_epoch < _MIN_PER_EPOCH:
        raise UserError(
            f"data.train: {len(examples):,} examples with their weights are {per_epoch:.3g} examples per epoch; "
            "increase data.*.weight"
        )
    total = per_epoch * (1 if training.max_steps is not None else max(1.0, training.num_train_epochs))
    if total > _MAX_ITEMS:
        key = "data.*.weight" if per_epoch > _MAX_ITEMS else "training.num_train_epochs"
        raise UserError(
            f"{key}: {total:.3g} examples, with their repetitions, are more than {_MAX_ITEMS:,} in a plan; use "
            "fewer, or data.streaming=true"
        )
    return plan_run(
        examples.num_tokens,
        data.max_length,
        training.batch_size,
        training.num_train_epochs,
        training.max_steps,
        training.seed,
        data.packing,
        data.shuffle,
        repeats,
    )


def sequence_lengths(data: DataConfig) -> list[int]:
    """Return the sequence lengths of a run in ascending order; streaming uses no buckets."""
    return [data.max_length] if data.packing or data.streaming else buckets(data.max_length)


def buckets(sequence_length: int) -> list[int]:
    """Return the sequence lengths of a run without packing, ascending: ``sequence_length``, its half, and so on.

    They are multiples of 128 if ``sequence_length`` is one, because attention kernels need that, and of 8 otherwise.

    >>> buckets(2048), buckets(640), buckets(100)
    ([128, 256, 512, 1024, 2048], [128, 256, 384, 640], [8, 16, 32, 56, 100])
    """
    grain = 8 if sequence_length % 128 else 128
    sizes = [sequence_length]
    while len(sizes) < MAX_BUCKETS:
        half = -(-sizes[-1] // (2 * grain)) * grain
        if half >= sizes[-1]:
            break
        sizes.append(half)
    return sizes[::-1]


def group_by_length(num_tokens: np.ndarray, order: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Reorder examples so that those of a step have similar lengths; the order of the steps is random.

    Examples are sorted only within ``SIMILAR_STEPS`` steps of the given order, so each epoch groups them differently.
    """
    window = SIMILAR_STEPS * batch_size
    if not len(order):  # with small source weights, an epoch may contain no examples
        return order
    windows = [order[start : start + window] for start in range(0, len(order), window)]
    grouped = np.concatenate([one[np.argsort(-num_tokens[one], kind="stable")] for one in windows])
    full = len(grouped) // batch_size
    steps = grouped[: full * batch_size].reshape(full, batch_size)[rng.permutation(full)]
    return np.concatenate([steps.reshape(-1), grouped[full * batch_size :]])


def pack(num_tokens: np.ndarray, order: np.ndarray, sequence_length: int, rearrange: bool = True) -> list[np.ndarray]:
    """Pack examples into sequences; each example is in exactly one sequence, and none is split.

    Best-fit decreasing within windows of the order; sequences with free space stay open for later windows. Without
    ``rearrange``, sequences are filled in the given order, and closed when the next example does not fit.

    With lengths ``[5, 3, 4, 2]``, sequence length 7 and the order 0, 1, 2, 3: sequences ``[0, 3]`` and ``[2, 1]``.
    """
    sequences: list[list[int]] = []
    if not rearrange:
        free = 0
        for item in order.tolist():
            size = int(num_tokens[item])
            if size > free:
                sequences.append([])
                free = sequence_length
            sequences[-1].append(item)
            free -= size
        return [np.asarray(sequence, np.int64) for sequence in sequences]
    # Open sequences by their free space. Bit f of `occupied` is set if by_free[f] is not empty, so the best fit for
    # an example is the lowest set bit that is not below its size.
    by_free: list[list[int]] = [[] for _ in range(sequence_length + 1)]
    occupied = 0
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        window = window[np.argsort(-num_tokens[window], kind="stable")]
        for item, size in zip(window.tolist(), num_tokens[window].tolist(), strict=True):
            fitting = occupied >> size
            if fitting:
                free = size + (fitting & -fitting).bit_length() - 1
                index = by_free[free].pop()
                if not by_free[free]:
                    occupied &= ~(1 << free)
            else:
                free, index = sequence_length, len(sequences)
                sequences.append([])
            sequences[index].append(item)
            if free > size:
                by_free[free - size].append(index)
                occupied |= 1 << (free - size)
    return [np.asarray(sequence, np.int64) for sequence in sequences]


def _occurrences(num: int, repeats: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    order = np.arange(num)
    if repeats is None:
        return order
    whole = np.floor(repeats).astype(np.int64)
    return np.repeat(order, whole + (rng.random(num) < repeats - whole))


def _offsets(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
