"""Reads, tokenizes and packs rows during training, for data that should not be tokenized in advance.

A batch of B sequences is fed by B streams. Stream ``i`` takes every B-th row of each source, starting at row ``i``,
mixes the sources, and packs the sequence at index ``i`` of every batch. A process runs only the streams of its own
sequences, so each row is tokenized once, and batches do not depend on the number of hosts. To resume, a stream reads
again only the rows that are in its open sequences.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh

from sft_jax.config import Config, DataConfig, SourceConfig
from sft_jax.data.batches.loader import local_sequences, to_mesh
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.rows import RowError
from sft_jax.data.read.sources import Source, open_sources
from sft_jax.distributed.processes import gather
from sft_jax.errors import UserError
from sft_jax.typing import Batch

_FIRST_ROWS = 1000
_OPEN_SEQUENCES = 8  # sequences that a stream packs at the same time
_THREADS = 4  # threads that run the streams
_PREFETCH = _OPEN_SEQUENCES  # batches; a stream completes its open sequences together
_MAX_EXAMPLES = 1024  # maximum number of examples per row
Example = dict[str, np.ndarray]


def first_rows(configs: Sequence[SourceConfig]) -> list[SourceConfig]:
    """Limit sources to their first rows, which are checked before training and provide the stop tokens."""
    return [dataclasses.replace(one, max_rows=min(_FIRST_ROWS, one.max_rows or _FIRST_ROWS)) for one in configs]


def stream(config: Config, encoder: Encoder, groups: Sequence[str], mesh: Mesh, max_positions: int) -> StreamLoader:
    """Create the loader of a config with ``data.streaming``.

    Args:
        groups: labels of the sources; metrics report one loss per label.
    """
    sources = open_sources(config.data.train)
    indices = [list(groups).index(source.group) for source in sources]
    batch_size, seed = config.training.batch_size, config.training.seed
    return StreamLoader(sources, encoder, config.data, mesh, batch_size, seed, indices, max_positions)


class StreamLoader:
    """Iterates over an endless sequence of batches; its state has a position for each stream of this process.

    A state is valid only for data of the same ``sizes``: names and numbers of rows of the sources.

    Args:
        groups: index of the group of each source; metrics report one loss per group.
        max_positions: maximum number of positions of the model.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Encoder,
        config: DataConfig,
        mesh: Mesh,
        batch_size: int,
        seed: int,
        groups: Sequence[int],
        max_positions: int,
    ):
        self.sizes = ", ".join(f"{source.name} {len(source)}" for source in sources)
        self._local = local_sequences(mesh, batch_size)
        self._mesh, self._batch_size = mesh, batch_size
        self._has_groups = len(set(groups)) > 1
        weights = [len(source) * source.weight for source in sources]
        streams = {}
        for index in range(*self._local.indices(batch_size)):
            guard = _EmptyStreamGuard(index, sum(map(len, sources)))
            datasets = []
            for source, group in zip(sources, groups, strict=True):
                examples = _Examples(source, encoder, config, group, max_positions, guard)
                dataset = grain.MapDataset.source(examples).seed(seed)  # type: ignore[arg-type]
                datasets.append((dataset.shuffle() if config.shuffle else dataset).repeat()[index::batch_size])
            mixed = grain.MapDataset.mix(datasets, weights) if len(datasets) > 1 else datasets[0]
            streams[index] = _packed(mixed, config, int(np.random.SeedSequence([seed, index]).generate_state(1)[0]))
        batches = grain.experimental.ThreadPrefetchIterDataset(_Streams(streams), prefetch_buffer_size=_PREFETCH)
        self._iterator = iter(batches)

    def __iter__(self) -> Iterator[Batch]:
        for sequences in self._iterator:
            yield to_mesh(self._batch(sequences), self._mesh, self._batch_size, self._local)

    def _batch(self, sequences: list[Example]) -> Batch:
        names = ("inputs", "targets", "loss_mask", "inputs_segment_ids", "inputs_positions", "sources")
        fields: list[Any] = [np.stack([sequence[name] for sequence in sequences]) for name in names]
        inputs, targets, loss_mask, segment_ids, positions, sources = fields
        return Batch(inputs, targets, loss_mask, segment_ids, positions, sources if self._has_groups else None)

    def get_state(self) -> dict[str, Any]:
        """Return the state of this process's streams as JSON values."""
        return self._iterator.get_state()

    def merge_states(self, state: dict[str, Any]) -> dict[str, Any]:
        """Merge the states of all processes. A collective: all processes have to call it."""
        return {
            index: stream_state
            for value in gather("the position in the stream", json.dumps(state))
            for index, stream_state in json.loads(value).items()
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from a merged state.

        Raises:
            UserError: an older version has written the state.
        """
        if not self._iterator.get_state().keys() <= state.keys():
            raise UserError(
                "data.streaming: an older version has written this run's position in the data; start a new run"
            )
        self._iterator.set_state(state)


def _packed(examples: grain.MapDataset, config: DataConfig, seed: int) -> grain.IterDataset:
    """Pack examples into sequences."""
    split = grain.experimental.FlatMapIterDataset(
        examples.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)), _Split()
    )
    return grain.experimental.FirstFitPackIterDataset(
        split,
        length_struct=dict.fromkeys(("inputs", "targets", "loss_mask", "sources"), config.max_length),
        num_packing_bins=_OPEN_SEQUENCES,
        seed=seed,
        shuffle_bins=config.shuffle,
        max_sequences_per_bin=None if config.packing else 1,
    )


class _Streams(grain.IterDataset):
    """Iterates over all streams in parallel; its state maps the index of each stream, as text, to its state."""

    def __init__(self, streams: dict[int, grain.IterDataset]):
        super().__init__()
        self._streams = streams

    def __iter__(self) -> _StreamsIterator:
        return _StreamsIterator({str(index): iter(stream) for index, stream in self._streams.items()})


class _StreamsIterator(grain.DatasetIterator):
    def __init__(self, streams: dict[str, grain.DatasetIterator]):
        super().__init__(list(streams.values()))
        self._streams = streams
        self._threads = ThreadPoolExecutor(_THREADS, "stream")

    def __next__(self) -> list[Example]:
        return list(self._threads.map(next, self._streams.values()))

    def get_state(self) -> dict[str, Any]:
        return {index: stream.get_state() for index, stream in self._streams.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        for index, stream in self._streams.items():
            stream.set_state(state[index])


class _EmptyStreamGuard:
    """Ends a stream that finds no examples, and would otherwise never return."""

    def __init__(self, index: int, max_rows: int):
        self._index, self._max_rows, self._num_empty = index, max_rows, 0

    def count(self, num_examples: int, where: str) -> None:
        """Count the examples of a row.

        Raises:
            UserError: more than ``max_rows`` consecutive rows had no examples.
        """
        self._num_empty = 0 if num_examples else self._num_empty + 1
        if self._num_empty > self._max_rows:
            raise UserError(
                f"data.streaming: {self._max_rows:,} consecutive rows, up to {where}, gave no examples for sequence "
                f"{self._index} of the batch; increase data.max_length, set data.shuffle=true, or run sft-jax inspect"
            )


class _Examples:
    """Random access to the examples of each row of a source, shifted and ready for packing."""

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        config: DataConfig,
        group: int,
        max_positions: int,
        guard: _EmptyStreamGuard,
    ):
        self._source, self._encoder, self._config = source, encoder, config
        self._group, self._max_positions, self._guard = group, max_positions, guard

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> list[Example]:
        rows = list(self._source.read(row, row + 1, self._encoder.keep_reasoning))
        (encoded,) = self._encoder.encode(rows)
        if isinstance(encoded, RowError):
            if self._config.on_bad_row == "error":
                raise UserError(encoded.at(self._source.name, row))
            encoded = []
        examples: list[Example] = []
        for one in encoded:
            ids, mask, max_length = one.ids, one.mask, self._config.max_length
            if len(ids) > max_length:
                if self._config.overlong == "error":
                    raise UserError(
                        f"{self._source.name} row {row}: {len(ids)} tokens are more than data.max_length {max_length}; "
                        "increase it, or set data.overlong to drop or truncate"
                    )
                if self._config.overlong == "drop":
                    continue
                ids, mask = ids[:max_length], mask[:max_length]
            if len(ids) > self._max_positions:
                raise UserError(
                    f"data.max_length: {self._source.name} row {row} has {len(ids)} tokens, but the model has "
                    f"{self._max_positions} positions; set data.max_length={self._max_positions}"
                )
            if mask[1:].any():
                sources = np.full(len(ids) - 1, self._group, np.int32)
                examples.append({"inputs": ids[:-1], "targets": ids[1:], "loss_mask": mask[1:], "sources": sources})
        self._guard.count(len(examples), f"{self._source.name} row {row}")
        return examples


class _Split(grain.experimental.FlatMapTransform):
    """Splits the list of examples of a row."""

    max_fan_out = _MAX_EXAMPLES

    def flat_map(self, element: list[Example]) -> list[Example]:
        return element
