"""Rows that are read, tokenised and packed while training, for data that are not to be tokenised beforehand.

Each source is dealt out to as many lanes as a batch has rows, and each lane mixes and packs its own row. A process runs
the lanes of its rows only: it reads and tokenises its share, and batches do not depend on the number of hosts. The
position in a lane is small, and going on from it reads again only what the open rows were filled from.
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
from sft_jax.data.batches.loader import local_rows, to_mesh
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.rows import RowError
from sft_jax.data.read.sources import Source, open_sources
from sft_jax.distributed.processes import gather
from sft_jax.errors import UserError
from sft_jax.typing import Batch

_FIRST_ROWS = 1000
_OPEN_BINS = 8  # rows that a lane fills at the same time
_THREADS = 4  # that fill the lanes
_AHEAD = _OPEN_BINS  # batches: a lane fills its rows together, and then has that many
_MAX_EXAMPLES = 1024  # that one row may give
Example = dict[str, np.ndarray]


def first_rows(given: Sequence[SourceConfig]) -> list[SourceConfig]:
    """The sources cut to their first rows, which tell stop tokens and most mistakes before the first step."""
    return [dataclasses.replace(one, max_rows=min(_FIRST_ROWS, one.max_rows or _FIRST_ROWS)) for one in given]


def stream(config: Config, encoder: Encoder, groups: Sequence[str], mesh: Mesh, max_positions: int) -> StreamLoader:
    """The stream that a config describes.

    Args:
        groups: paths in the config whose losses are told apart.
    """
    sources = open_sources(config.data.train)
    of = [list(groups).index(source.given) for source in sources]
    batch_size, seed = config.training.batch_size, config.training.seed
    return StreamLoader(sources, encoder, config.data, mesh, batch_size, seed, of, max_positions)


class StreamLoader:
    """Iterates over batches without an end; its state is a position in each lane of this process.

    A position is one in data of these ``sizes`` only: names and numbers of rows of the sources.

    Args:
        groups: which of the sources whose losses are told apart each source belongs to.
        max_positions: of the model.
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
        self._rows = local_rows(mesh, batch_size)
        self._mesh, self._batch_size = mesh, batch_size
        self._has_groups = len(set(groups)) > 1
        weights = [len(source) * source.weight for source in sources]
        lanes = {}
        for row in range(*self._rows.indices(batch_size)):
            patience = _Patience(row, sum(map(len, sources)))
            streams = []
            for source, group in zip(sources, groups, strict=True):
                examples = _Examples(source, encoder, config, group, max_positions, patience)
                stream = grain.MapDataset.source(examples).seed(seed)  # type: ignore[arg-type]
                streams.append((stream.shuffle() if config.shuffle else stream).repeat()[row::batch_size])
            mixed = grain.MapDataset.mix(streams, weights) if len(streams) > 1 else streams[0]
            lanes[row] = _lane(mixed, config, int(np.random.SeedSequence([seed, row]).generate_state(1)[0]))
        self._iterator = iter(grain.experimental.ThreadPrefetchIterDataset(_Lanes(lanes), prefetch_buffer_size=_AHEAD))

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._iterator:
            yield to_mesh(self._batch(rows), self._mesh, self._batch_size, self._rows)

    def _batch(self, rows: list[Example]) -> Batch:
        names = ("inputs", "targets", "loss_mask", "inputs_segment_ids", "inputs_positions", "sources")
        fields: list[Any] = [np.stack([row[name] for row in rows]) for name in names]
        inputs, targets, loss_mask, segment_ids, positions, sources = fields
        return Batch(inputs, targets, loss_mask, segment_ids, positions, sources if self._has_groups else None)

    def get_state(self) -> dict[str, Any]:
        """The position in this process's lanes, as plain JSON."""
        return self._iterator.get_state()

    def whole_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The position in all lanes, of a :meth:`get_state` of each process; all have to ask."""
        return {
            row: lane
            for said in gather("the position in the stream", json.dumps(state))
            for row, lane in json.loads(said).items()
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a position in all lanes.

        Raises:
            UserError: a position that an older version has written.
        """
        if not self._iterator.get_state().keys() <= state.keys():
            raise UserError("data.streaming: an older version has written this run's position in the data; start anew")
        self._iterator.set_state(state)


def _lane(examples: grain.MapDataset, config: DataConfig, seed: int) -> grain.IterDataset:
    """The rows that some examples fill, one after the other."""
    split = grain.experimental.FlatMapIterDataset(
        examples.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)), _Split()
    )
    return grain.experimental.FirstFitPackIterDataset(
        split,
        length_struct=dict.fromkeys(("inputs", "targets", "loss_mask", "sources"), config.max_length),
        num_packing_bins=_OPEN_BINS,
        seed=seed,
        shuffle_bins=config.shuffle,
        max_sequences_per_bin=None if config.packing else 1,
    )


class _Lanes(grain.IterDataset):
    """A row of each lane at a time; its state has the lanes' by their number, as text."""

    def __init__(self, lanes: dict[int, grain.IterDataset]):
        super().__init__()
        self._lanes = lanes

    def __iter__(self) -> _LanesIterator:
        return _LanesIterator({str(row): iter(lane) for row, lane in self._lanes.items()})


class _LanesIterator(grain.DatasetIterator):
    def __init__(self, lanes: dict[str, grain.DatasetIterator]):
        super().__init__(list(lanes.values()))
        self._lanes = lanes
        self._threads = ThreadPoolExecutor(_THREADS, "lane")

    def __next__(self) -> list[Example]:
        return list(self._threads.map(next, self._lanes.values()))

    def get_state(self) -> dict[str, Any]:
        return {row: lane.get_state() for row, lane in self._lanes.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        for row, lane in self._lanes.items():
            lane.set_state(state[row])


class _Patience:
    """Ends a lane that finds nothing: it would look for ever."""

    def __init__(self, row: int, most: int):
        self._row, self._most, self._in_vain = row, most, 0

    def saw(self, num_examples: int, where: str) -> None:
        """How many examples a row of data gave."""
        self._in_vain = 0 if num_examples else self._in_vain + 1
        if self._in_vain > self._most:
            raise UserError(
                f"data.streaming: {self._most:,} rows in turn, up to {where}, gave row {self._row} of the batches "
                "nothing to train on; raise data.max_length, set data.shuffle=true, or see what sft-jax inspect says"
            )


class _Examples:
    """Random access to what each row of a source gives: some examples, shifted and fit to be packed."""

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        config: DataConfig,
        group: int,
        max_positions: int,
        patience: _Patience,
    ):
        self._source, self._encoder, self._config = source, encoder, config
        self._group, self._max_positions, self._patience = group, max_positions, patience

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> list[Example]:
        rows = list(self._source.read(row, row + 1, self._encoder.keep_reasoning))
        (found,) = self._encoder.encode(rows)
        if isinstance(found, RowError):
            if self._config.on_bad_row == "error":
                raise UserError(found.at(self._source.name, row))
            found = []
        fitting: list[Example] = []
        for one in found:
            ids, mask, longest = one.ids, one.mask, self._config.max_length
            if len(ids) > longest:
                if self._config.overlong == "error":
                    raise UserError(
                        f"{self._source.name} row {row}: {len(ids)} tokens are more than data.max_length {longest}"
                    )
                if self._config.overlong == "drop":
                    continue
                ids, mask = ids[:longest], mask[:longest]
            if len(ids) > self._max_positions:
                raise UserError(
                    f"data.max_length: {self._source.name} row {row} has {len(ids)} tokens, the model has "
                    f"{self._max_positions} positions; set data.max_length={self._max_positions}"
                )
            if mask[1:].any():
                sources = np.full(len(ids) - 1, self._group, np.int32)
                fitting.append({"inputs": ids[:-1], "targets": ids[1:], "loss_mask": mask[1:], "sources": sources})
        self._patience.saw(len(fitting), f"{self._source.name} row {row}")
        return fitting


class _Split(grain.experimental.FlatMapTransform):
    """The examples of a row, one by one."""

    max_fan_out = _MAX_EXAMPLES

    def flat_map(self, element: list[Example]) -> list[Example]:
        return element
