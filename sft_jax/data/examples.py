"""All encoded rows of a data set in flat arrays, with where each came from and what was left out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from sft_jax.data.chat import Encoded, Encoder, RowError
from sft_jax.data.sources import Rows
from sft_jax.errors import UserError

_BATCH = 1000


@dataclass
class Report:
    """What became of the rows."""

    rows: int = 0
    kept: int = 0
    tokens: int = 0  # of kept rows
    targets: int = 0
    dropped: int = 0  # longer than max_length
    dropped_without_targets: int = 0  # nothing to train on was left after truncation
    truncated: int = 0
    targets_lost: int = 0  # by dropping and truncating
    straddling: int = 0
    stop_tokens: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Examples:
    """Encoded rows end to end: row ``i`` is ``ids[offsets[i]:offsets[i + 1]]``, its mask likewise."""

    ids: np.ndarray  # int32
    mask: np.ndarray  # bool
    offsets: np.ndarray  # int64, one more than rows
    source: np.ndarray  # int32, index into names
    row: np.ndarray  # int64, row in its source
    names: tuple[str, ...]
    weights: tuple[float, ...]  # of the sources
    stop_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of one row."""
        where = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[where], self.mask[where]

    @property
    def slots(self) -> np.ndarray:
        """How many slots each row takes in a batch: one less than its ids, because inputs and targets are shifted."""
        return np.diff(self.offsets) - 1

    def describe(self, index: int) -> str:
        """``file.jsonl row 17``."""
        return f"{self.names[self.source[index]]} row {self.row[index]}"

    def fingerprint(self) -> str:
        """A short hash of all ids and masks: whether a resumed run sees the same data."""
        digest = hashlib.sha256()
        for array in (self.ids, self.mask, self.offsets):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def join(encoded: Sequence[Encoded], name: str) -> Examples:
    """Encoded rows of one source, end to end."""
    return Examples(
        ids=np.concatenate([np.asarray(row.ids, np.int32) for row in encoded]),
        mask=np.concatenate([np.asarray(row.mask, bool) for row in encoded]),
        offsets=np.concatenate([[0], np.cumsum([len(row.ids) for row in encoded], dtype=np.int64)]),
        source=np.zeros(len(encoded), np.int32),
        row=np.arange(len(encoded), dtype=np.int64),
        names=(name,),
        weights=(1.0,),
        stop_ids=(),
    )


def encode_sources(
    sources: Sequence[Rows],
    encoder: Encoder,
    max_length: int,
    overlong: str = "drop",
    progress: Callable[[int], object] = lambda rows: None,
) -> tuple[Examples, Report]:
    """Encode every row of every source; rows longer than ``max_length`` ids are handled as ``overlong`` says.

    ``truncate`` cuts at the end and never adds a stop token to a cut answer, which would teach stopping early; a row
    left without targets is dropped. ``progress`` is called with the number of rows done since the last call.

    Raises:
        UserError: a row that cannot be encoded (file and row), an overlong row under ``error``, or nothing left.
    """
    report = Report()
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    origins: list[tuple[int, int]] = []
    for source_index, source in enumerate(sources):
        for row, encoded in _encode_rows(source, encoder, progress):
            report.rows += 1
            kept = _fit(encoded, max_length, overlong, f"{source.name} row {row}", report)
            if kept is not None:
                ids.append(np.asarray(kept.ids, np.int32))
                masks.append(np.asarray(kept.mask, bool))
                origins.append((source_index, row))
    if not ids:
        names = ", ".join(source.name for source in sources)
        raise UserError(f"{names}: all {report.rows} rows are longer than data.max_length {max_length}; raise it")
    examples = Examples(
        ids=np.concatenate(ids),
        mask=np.concatenate(masks),
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in ids], dtype=np.int64)]),
        source=np.asarray([source for source, _ in origins], np.int32),
        row=np.asarray([row for _, row in origins], np.int64),
        names=tuple(source.name for source in sources),
        weights=tuple(source.weight for source in sources),
        stop_ids=tuple(stop for stop, _ in encoder.stop_counts.most_common()),
    )
    report.kept, report.tokens = len(examples), len(examples.ids)
    report.targets = int(examples.mask.sum() - examples.mask[examples.offsets[:-1]].sum())
    report.straddling = encoder.num_straddling
    tokens = encoder.tokenizer.convert_ids_to_tokens
    report.stop_tokens = {tokens(stop): count for stop, count in encoder.stop_counts.most_common()}
    return examples, report


def _encode_rows(source: Rows, encoder: Encoder, progress: Callable[[int], object]) -> Iterator[tuple[int, Encoded]]:
    for start in range(0, len(source.rows), _BATCH):
        columns = source.rows[start : start + _BATCH]
        batch = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        try:
            encoded = encoder.encode(source.format, batch)
        except RowError as error:
            raise UserError(f"{source.name} row {start + error.index}: {error}") from error
        yield from enumerate(encoded, start)
        progress(len(batch))


def _fit(row: Encoded, max_length: int, overlong: str, name: str, report: Report) -> Encoded | None:
    num_targets = sum(row.mask[1:])  # the first token is never predicted
    if num_targets == 0:
        raise UserError(f"{name}: nothing to train on; every token is context")
    if len(row.ids) <= max_length:
        return row
    if overlong == "error":
        raise UserError(
            f"{name}: {len(row.ids)} tokens are more than data.max_length {max_length}; "
            "raise it or set data.overlong to drop or truncate"
        )
    cut = Encoded(row.ids[:max_length], row.mask[:max_length])
    num_left = sum(cut.mask[1:])
    if overlong == "drop":
        report.dropped += 1
        report.targets_lost += num_targets
        return None
    report.targets_lost += num_targets - num_left
    if num_left == 0:
        report.dropped_without_targets += 1
        return None
    report.truncated += 1
    return cut
