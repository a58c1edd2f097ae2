"""Rows that are read, tokenised and packed while training, for data that are not to be tokenised beforehand.

Every process reads the same stream and takes its rows of each batch, so batches do not depend on the number of hosts.
The position in the stream is small, and going on from it reads again only what the open rows were filled from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh

from sft_jax.config import Config, DataConfig, SourceConfig
from sft_jax.data.chat import Encoder
from sft_jax.data.loader import local_rows, to_mesh
from sft_jax.data.rows import RowError
from sft_jax.data.sources import Source, open_sources
from sft_jax.errors import UserError
from sft_jax.typing import Batch

_FIRST_ROWS = 1000
_OPEN_BINS = 4  # rows that are filled at the same time, as a multiple of the batch
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
    """Iterates over batches without an end; its state is a position in the stream.

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
        self._rows = local_rows(mesh, batch_size)
        self._mesh, self._batch_size = mesh, batch_size
        self._has_groups = len(set(groups)) > 1
        length = config.max_length
        streams = []
        for source, group in zip(sources, groups, strict=True):
            examples = _Examples(source, encoder, config, group, max_positions)
            stream = grain.MapDataset.source(examples).seed(seed)  # type: ignore[arg-type]
            streams.append((stream.shuffle() if config.shuffle else stream).repeat())
        weights = [len(source) * source.weight for source in sources]
        mixed = grain.MapDataset.mix(streams, weights) if len(streams) > 1 else streams[0]
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)
        split = grain.experimental.FlatMapIterDataset(mixed.to_iter_dataset(options), _Split())
        packed = grain.experimental.FirstFitPackIterDataset(
            split,
            length_struct=dict.fromkeys(("inputs", "targets", "loss_mask", "sources"), length),
            num_packing_bins=_OPEN_BINS * batch_size,
            seed=seed,
            shuffle_bins=config.shuffle,
            max_sequences_per_bin=None if config.packing else 1,
        )
        self._iterator = iter(packed.batch(batch_size, drop_remainder=True))

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._iterator:
            yield to_mesh(self._batch(rows), self._mesh, self._batch_size, self._rows)

    def _batch(self, rows: dict[str, np.ndarray]) -> Batch:
        names = ("inputs", "targets", "loss_mask", "inputs_segment_ids", "inputs_positions", "sources")
        fields: list[Any] = [rows[name][self._rows] for name in names]
        inputs, targets, loss_mask, segment_ids, positions, sources = fields
        return Batch(inputs, targets, loss_mask, segment_ids, positions, sources if self._has_groups else None)

    def get_state(self) -> dict[str, Any]:
        """The position in the stream, as plain JSON."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a position that :meth:`get_state` gave."""
        self._iterator.set_state(state)


class _Examples:
    """Random access to what each row of a source gives: some examples, shifted and fit to be packed."""

    def __init__(self, source: Source, encoder: Encoder, config: DataConfig, group: int, max_positions: int):
        self._source, self._encoder, self._config = source, encoder, config
        self._group, self._max_positions = group, max_positions

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> list[Example]:
        rows = list(self._source.read(row, row + 1, self._encoder.keep_reasoning))
        (found,) = self._encoder.encode(rows)
        if isinstance(found, RowError):
            if self._config.on_bad_row == "error":
                raise UserError(found.at(self._source.name, row))
            return []
        fitting = []
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
        return fitting


class _Split(grain.experimental.FlatMapTransform):
    """The examples of a row, one by one."""

    max_fan_out = _MAX_EXAMPLES

    def flat_map(self, element: list[Example]) -> list[Example]:
        return element
