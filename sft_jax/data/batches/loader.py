"""Builds the batches of a plan in the background with grain, and places them on the mesh."""

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
    """Random access to the batches of a plan: ``source[step]`` holds the sequences of this process, as numpy arrays."""

    examples: Examples
    plan: Plan
    batch_size: int  # sequences in the global batch
    local: slice  # the sequences of the global batch that this process needs

    def __len__(self) -> int:
        return self.plan.num_steps

    def __getitem__(self, step: int) -> Batch:
        return make_batch(
            self.examples,
            self.plan.rows_of(step)[self.local],
            len(range(*self.local.indices(self.batch_size))),
            int(self.plan.lengths[step]),
        )


def make_batch(examples: Examples, sequences: list[np.ndarray], num_sequences: int, sequence_length: int) -> Batch:
    """Build a batch ``[num_sequences, sequence_length]`` from the examples of each sequence; the rest is padding.

    Each example is shifted first and packed second. Two examples with the ids ``[5, 6, 2]`` and ``[7, 2]``, supervised
    on all but their first token, in a sequence of length 5::

        inputs        5 6 7 0 0
        targets       6 2 2 0 0
        loss_mask     1 1 1 0 0
        segment_ids   1 1 2 0 0
        positions     0 1 0 0 0
    """
    shape = (num_sequences, sequence_length)
    inputs, targets, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(4))
    loss_mask = np.zeros(shape, np.float32)
    sources = np.zeros(shape, np.int32) if len(examples.groups) > 1 else None
    for r, items in enumerate(sequences):
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


def local_sequences(mesh: Mesh, batch_size: int) -> slice:
    """Return which sequences of a global batch the devices of this process hold."""
    sharding = named_sharding(mesh, ("batch", "length"), (batch_size, 1))
    ranges = [
        range(batch_size)[index[0]]
        for index in sharding.addressable_devices_indices_map((batch_size, 1)).values()
        if index is not None
    ]
    return slice(min(one.start for one in ranges), max(one.stop for one in ranges))


def to_mesh(batch: Batch, mesh: Mesh, batch_size: int, local: slice) -> Batch:
    """Build global arrays ``[batch_size, T]``, sharded over batch and length, from the sequences of each process."""

    def to_global(array: np.ndarray) -> jax.Array:
        shape = (batch_size, array.shape[1])

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return array[start - local.start : stop - local.start, index[1]]

        return jax.make_array_from_callback(shape, named_sharding(mesh, ("batch", "length"), shape), shard)  # type: ignore[arg-type]

    return jax.tree.map(to_global, batch)


class Loader:
    """Iterates over the batches of a plan, starting at any step; its state is the next step."""

    def __init__(self, examples: Examples, plan: Plan, mesh: Mesh, batch_size: int):
        self._local = local_sequences(mesh, batch_size)
        self._mesh, self._batch_size = mesh, batch_size
        source = StepSource(examples, plan, batch_size, self._local)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._iterator:
            yield to_mesh(batch, self._mesh, self._batch_size, self._local)

    def get_state(self) -> dict:
        """Return the state as JSON values."""
        return self._iterator.get_state()

    def merge_states(self, state: dict) -> dict:
        """Merge the states of all processes; here they are the same."""
        return state

    def set_state(self, state: dict) -> None:
        """Resume from a state."""
        self._iterator.set_state(state)
