"""The plan of a run: which examples share a row, which rows make a step. Known before the first step.

Because the plan is made from lengths and a seed alone, step counts are exact, any step can be built without the ones
before it, and the global batches do not depend on the number of hosts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sft_jax.config import DataConfig, TrainingConfig
from sft_jax.data.tokens.examples import Examples

WINDOW = 8192  # examples whose lengths are looked at together
MAX_BUCKETS = 5  # row lengths of a run that does not pack; the step is compiled for each of them
SIMILAR_STEPS = 32  # steps among which such a run sorts its examples by length


@dataclass(frozen=True)
class Plan:
    """Steps of rows of examples, flat: row ``r`` holds ``items[rows[r]:rows[r + 1]]``, step ``s`` has the rows
    ``steps[s] … steps[s + 1]``. The last step of an epoch may have fewer rows than the others."""

    items: np.ndarray
    rows: np.ndarray
    steps: np.ndarray
    lengths: np.ndarray  # of the rows of each step: the smallest bucket that holds its longest example, or all alike
    epoch_ends: tuple[int, ...]  # the step after the last one of each epoch

    @property
    def num_steps(self) -> int:
        return len(self.steps) - 1

    @property
    def num_slots(self) -> int:
        """Of all rows there are."""
        return int((np.diff(self.steps) * self.lengths).sum())

    def rows_of(self, step: int) -> list[np.ndarray]:
        """The examples of each row of a step."""
        first, last = self.steps[step], self.steps[step + 1]
        return [self.items[self.rows[r] : self.rows[r + 1]] for r in range(first, last)]


def plan_run(
    slots: np.ndarray,
    row_length: int,
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
        slots: how many slots each example takes; none may exceed ``row_length``.
        row_length: slots of a row.
        batch_size: rows of a step.
        num_epochs: how often every example is seen; a fraction ends the last epoch early.
        max_steps: counts instead of epochs where given.
        repeats: how often each example is seen in an epoch (default once); of a fractional part a new random share
            is taken each epoch.
    """
    assert len(slots) > 0
    assert int(slots.max()) <= row_length
    items, row_sizes, step_sizes, epoch_ends = [], [], [], []
    epoch = 0
    while len(step_sizes) < max_steps if max_steps is not None else epoch < num_epochs:
        rng = np.random.default_rng([seed, epoch])
        order = _occurrences(len(slots), repeats, rng)
        if shuffle:
            rng.shuffle(order)
        if packing:
            rows = pack(slots, order, row_length, shuffle)
            rows = [rows[i] for i in rng.permutation(len(rows))] if shuffle else rows
        else:
            order = group_by_length(slots, order, batch_size, rng) if shuffle else order
            rows = [order[i : i + 1] for i in range(len(order))]
        sizes = [min(batch_size, len(rows) - i) for i in range(0, len(rows), batch_size)]
        if max_steps is not None:
            sizes = sizes[: max_steps - len(step_sizes)]
        elif num_epochs - epoch < 1:
            sizes = sizes[: max(1, round(len(sizes) * (num_epochs - epoch)))]
        rows = rows[: sum(sizes)]
        items += rows
        row_sizes += [len(row) for row in rows]
        step_sizes += sizes
        epoch_ends.append(len(step_sizes))
        epoch += 1
    steps = _offsets(step_sizes)
    flat = np.concatenate(items) if items else np.zeros(0, np.int64)
    lengths = np.full(len(step_sizes), row_length)
    if not packing and len(flat):
        sizes = np.asarray(buckets(row_length))
        lengths = sizes[np.searchsorted(sizes, np.maximum.reduceat(slots[flat], steps[:-1]))]
    return Plan(flat, _offsets(row_sizes), steps, lengths, tuple(epoch_ends))


def plan_of(data: DataConfig, training: TrainingConfig, examples: Examples) -> Plan:
    """The plan of a run that a config describes."""
    repeats = None
    if any(weight != 1.0 for weight in examples.weights):
        repeats = np.asarray(examples.weights)[examples.source]
    return plan_run(
        examples.slots,
        data.max_length,
        training.batch_size,
        training.num_train_epochs,
        training.max_steps,
        training.seed,
        data.packing,
        data.shuffle,
        repeats,
    )


def row_lengths(data: DataConfig) -> list[int]:
    """The lengths that rows of a run have, rising; a stream has no plan, and so no buckets."""
    return [data.max_length] if data.packing or data.streaming else buckets(data.max_length)


def buckets(row_length: int) -> list[int]:
    """The row lengths of a run that does not pack: ``row_length``, its half, and so on, rising.

    They are multiples of 128 where ``row_length`` is one, as attention kernels like it, and of 8 otherwise.

    >>> buckets(2048), buckets(640), buckets(100)
    ([128, 256, 512, 1024, 2048], [128, 256, 384, 640], [8, 16, 32, 56, 100])
    """
    grain = 8 if row_length % 128 else 128
    sizes = [row_length]
    while len(sizes) < MAX_BUCKETS:
        half = -(-sizes[-1] // (2 * grain)) * grain
        if half >= sizes[-1]:
            break
        sizes.append(half)
    return sizes[::-1]


def group_by_length(slots: np.ndarray, order: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """An order in which the examples of a step are of similar length; the steps themselves come at random.

    Examples are sorted within ``SIMILAR_STEPS`` steps of the given order, so that which of them meet is still random.
    """
    window = SIMILAR_STEPS * batch_size
    if not len(order):  # sources of so little weight that an epoch may have none of their examples
        return order
    parts = [order[start : start + window] for start in range(0, len(order), window)]
    grouped = np.concatenate([part[np.argsort(-slots[part], kind="stable")] for part in parts])
    full = len(grouped) // batch_size
    steps = grouped[: full * batch_size].reshape(full, batch_size)[rng.permutation(full)]
    return np.concatenate([steps.reshape(-1), grouped[full * batch_size :]])


def pack(slots: np.ndarray, order: np.ndarray, row_length: int, rearrange: bool = True) -> list[np.ndarray]:
    """Put examples into rows; none is cut, left out or seen twice.

    Best fit by decreasing length within windows of the order; rows that are not full stay open for later windows.
    Without ``rearrange``, rows are filled in the given order, each closed when the next example does not fit.

    With lengths ``[5, 3, 4, 2]``, rows of 7 slots and the order 0, 1, 2, 3: rows ``[0, 3]`` and ``[2, 1]``.
    """
    rows: list[list[int]] = []
    if not rearrange:
        room = 0
        for item in order.tolist():
            size = int(slots[item])
            if size > room:
                rows.append([])
                room = row_length
            rows[-1].append(item)
            room -= size
        return [np.asarray(row, np.int64) for row in rows]
    # Open rows by the room they have left; bit r of `rooms` says that by_room[r] is not empty, so the tightest row
    # that fits is the lowest set bit from the wanted size on.
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        window = window[np.argsort(-slots[window], kind="stable")]
        for item, size in zip(window.tolist(), slots[window].tolist(), strict=True):
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                row = by_room[room].pop()
                if not by_room[room]:
                    rooms &= ~(1 << room)
            else:
                room, row = row_length, len(rows)
                rows.append([])
            rows[row].append(item)
            if room > size:
                by_room[room - size].append(row)
                rooms |= 1 << (room - size)
    return [np.asarray(row, np.int64) for row in rows]


def _occurrences(num: int, repeats: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    order = np.arange(num)
    if repeats is None:
        return order
    whole = np.floor(repeats).astype(np.int64)
    return np.repeat(order, whole + (rng.random(num) < repeats - whole))


def _offsets(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
