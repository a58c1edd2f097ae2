"""Steps of a plan as batches on the mesh, built in the background by grain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from sft_jax.data.batches.packing import Plan
from sft_jax.data.tokens.examples import Examples
from sft_jax.sharding import named_sharding
from sft_jax.typing import Batch


@dataclass(frozen=True)
class StepSource:
    """Random access to the batches of a plan: ``source[step]`` has this process's rows, as numpy."""

    examples: Examples
    plan: Plan
    batch_size: int  # rows of the global batch
    rows: slice  # of the global batch, that this process needs

    def __len__(self) -> int:
        return self.plan.num_steps

    def __getitem__(self, step: int) -> Batch:
        return make_batch(
            self.examples,
            self.plan.rows_of(step)[self.rows],
            len(range(*self.rows.indices(self.batch_size))),
            int(self.plan.lengths[step]),
        )


def make_batch(examples: Examples, rows: list[np.ndarray], num_rows: int, row_length: int) -> Batch:
    """Rows of examples as a batch ``[num_rows, row_length]``; rows that are not given are padding.

    Each example is shifted first and packed second. Two examples with the ids ``[5, 6, 2]`` and ``[7, 2]``, trained
    on all but their first token, in a row of five slots::

        inputs        5 6 7 0 0
        targets       6 2 2 0 0
        loss_mask     1 1 1 0 0
        segment_ids   1 1 2 0 0
        positions     0 1 0 0 0
    """
    inputs, targets, segment_ids, positions = (np.zeros((num_rows, row_length), np.int32) for _ in range(4))
    loss_mask = np.zeros((num_rows, row_length), np.float32)
    sources = np.zeros((num_rows, row_length), np.int32) if len(examples.groups) > 1 else None
    for r, items in enumerate(rows):
        at = 0
        for segment, item in enumerate(items, start=1):
            ids, mask = examples[item]
            where = slice(at, at + len(ids) - 1)
            inputs[r, where], targets[r, where], loss_mask[r, where] = ids[:-1], ids[1:], mask[1:]
            segment_ids[r, where], positions[r, where] = segment, np.arange(len(ids) - 1)
            if sources is not None:
                sources[r, where] = examples.group(int(item))
            at = where.stop
    return Batch(inputs, targets, loss_mask, segment_ids, positions, sources)  # type: ignore[arg-type]


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """Which rows of a global batch the devices of this process hold."""
    sharding = named_sharding(mesh, ("batch", "length"), (batch_size, 1))
    parts = [
        range(batch_size)[index[0]]
        for index in sharding.addressable_devices_indices_map((batch_size, 1)).values()
        if index is not None
    ]
    return slice(min(part.start for part in parts), max(part.stop for part in parts))


def to_mesh(batch: Batch, mesh: Mesh, batch_size: int, rows: slice) -> Batch:
    """A process's rows as global arrays ``[batch_size, T]``, rows and slots split over the mesh."""

    def place(local: np.ndarray) -> jax.Array:
        shape = (batch_size, local.shape[1])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return local[start - rows.start : stop - rows.start, index[1]]

        return jax.make_array_from_callback(shape, named_sharding(mesh, ("batch", "length"), shape), part)  # type: ignore[arg-type]

    return jax.tree.map(place, batch)


class Loader:
    """Iterates over the batches of a plan from any step on; its state is the next step."""

    def __init__(self, examples: Examples, plan: Plan, mesh: Mesh, batch_size: int):
        self._rows = local_rows(mesh, batch_size)
        self._mesh, self._batch_size = mesh, batch_size
        source = StepSource(examples, plan, batch_size, self._rows)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._iterator:
            yield to_mesh(batch, self._mesh, self._batch_size, self._rows)

    def get_state(self) -> dict:
        """The data position, as plain JSON."""
        return self._iterator.get_state()

    def whole_state(self, state: dict) -> dict:
        """The position of all processes, of one :meth:`get_state`: each has the same."""
        return state

    def set_state(self, state: dict) -> None:
        """Continue from a position."""
        self._iterator.set_state(state)
