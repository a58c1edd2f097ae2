"""Encodes sources as examples, and reports which rows were kept, dropped and refused."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from sft_jax.data.chat.encoder import Encoded, Encoder, Tally
from sft_jax.data.read.sources import Source
from sft_jax.data.tokens.tokenise import Origin, tokenise
from sft_jax.data.tokens.tokenised import RowErrorAt, Tokenized
from sft_jax.errors import UserError


@dataclass
class SourceReport:
    """Counts of one source. Tokens and targets (supervised tokens) are those of the kept examples."""

    name: str
    format: str
    rows: int = 0
    refused: int = 0
    examples: int = 0  # including overlong ones; a row may give several
    kept: int = 0
    tokens: int = 0
    targets: int = 0
    dropped: int = 0  # examples longer than max_length
    dropped_without_targets: int = 0  # examples without supervised tokens after truncation
    truncated: int = 0
    targets_lost: int = 0  # supervised tokens lost by dropping and truncation
    left_out: dict[str, int] = field(default_factory=dict)  # examples left out by data.leave_out, by name
    reasons: list[RowErrorAt] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)  # unused columns and keys, and in how many rows
    passed_over: tuple[str, ...] = ()  # skipped files of other splits in the same folder
    origin: Origin = field(default_factory=lambda: Origin(False, 1, 0.0))
    label: str | None = None  # in the config

    @property
    def shown(self) -> str:
        """Its name after its label: ``math: data/gsm8k.jsonl``."""
        return f"{self.label}: {self.name}" if self.label else self.name


@dataclass
class Report:
    """Counts of all sources."""

    sources: list[SourceReport] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)  # of all encoded examples, also overlong ones
    stop_tokens: dict[str, int] = field(default_factory=dict)

    def total(self, name: str) -> int:
        """Return the sum of a count over all sources."""
        return sum(getattr(source, name) for source in self.sources)

    @property
    def not_read(self) -> list[str]:
        """The unused columns, keys and files of each source: ``a.jsonl: id (40 rows)``."""
        lines = []
        for source in self.sources:
            if source.unread:
                names = ", ".join(f"{name} ({count:,} rows)" for name, count in source.unread.items())
                lines.append(f"{source.name}: {names}")
            if source.passed_over:
                lines.append(f"files of other splits next to {source.name}: {', '.join(source.passed_over)}")
        return lines

    @property
    def left_out(self) -> dict[str, int]:
        """The number of examples left out by each name in ``data.leave_out``; each example is counted once."""
        counts: Counter[str] = Counter()
        for source in self.sources:
            counts.update(source.left_out)
        return dict(counts)

    @property
    def fraction_lost(self) -> float:
        """The fraction of supervised tokens that is lost by dropping and truncation."""
        lost = self.total("targets_lost")
        return lost / max(1, lost + self.total("targets"))

    @property
    def dropped_by_reason(self) -> dict[str, int]:
        """The number of dropped examples and refused rows, by reason.

        Reasons that differ only in the number of the message are counted together, under the first of them.
        """
        counts = Counter(
            {
                "longer than data.max_length": self.total("dropped"),
                "no supervised tokens left after truncation": self.total("dropped_without_targets"),
            }
        )
        counts.update({f"{name.replace('_', ' ')} (data.leave_out)": count for name, count in self.left_out.items()})
        first: dict[str, str] = {}
        for source in self.sources:
            for one in source.reasons:
                counts[first.setdefault(re.sub(r"^message \d+", "message", one.reason), one.reason)] += 1
            counts["refused for other reasons"] += source.refused - len(source.reasons)
        return {reason: count for reason, count in counts.items() if count}


@dataclass(frozen=True)
class Examples:
    """Encoded examples; example ``i`` is ``ids[starts[i]:starts[i] + lengths[i]]`` of its source, read from disk."""

    parts: tuple[Tokenized, ...]  # one per source
    source: np.ndarray  # int32 [examples]
    starts: np.ndarray  # int64
    lengths: np.ndarray  # int32
    row: np.ndarray  # int64, row in its source
    names: tuple[str, ...]
    weights: tuple[float, ...]  # sampling weight of each source
    stop_ids: tuple[int, ...]
    labels: tuple[str, ...] = ()  # of each source: its label in the config, or its path there

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids (int32) and the loss mask (float32) of one example."""
        part = self.parts[self.source[index]]
        where = slice(self.starts[index], self.starts[index] + self.lengths[index])
        return part.ids[where], part.weights[part.codes[where]]

    def take(self, which: np.ndarray) -> Examples:
        """Return some examples: those of an array of indices, or where an array of booleans is True."""
        return replace(
            self,
            source=self.source[which],
            starts=self.starts[which],
            lengths=self.lengths[which],
            row=self.row[which],
        )

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The distinct labels; metrics report one loss per label."""
        return tuple(dict.fromkeys(self.labels))

    def group(self, index: int) -> int:
        """Return the index of an example's group."""
        return self.groups.index(self.labels[self.source[index]])

    @property
    def num_tokens(self) -> np.ndarray:
        """The length of each example in a batch: one less than its ids, because targets are shifted by one."""
        return self.lengths - 1

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """Concatenate the ids and loss masks of all examples in memory."""
        rows = [self[i] for i in range(len(self))]
        return np.concatenate([ids for ids, _ in rows]), np.concatenate([mask for _, mask in rows])

    def describe(self, index: int) -> str:
        """Return the location of an example: ``file.jsonl row 17``."""
        return f"{self.names[self.source[index]]} row {self.row[index]}"

    def fingerprint(self) -> str:
        """Return a short hash of all ids and masks, to verify that a resumed run has the same data."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(part.digest.encode())
        for array in (self.source, self.starts, self.lengths):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


def join(encoded: Sequence[Encoded], name: str) -> Examples:
    """Combine encoded examples in memory as one source."""
    masks = np.concatenate([np.asarray(one.mask, np.float32) for one in encoded])
    weights, codes = np.unique(masks, return_inverse=True)
    lengths = np.asarray([len(one.ids) for one in encoded], np.int32)
    rows = np.arange(len(encoded), dtype=np.int64)
    part = Tokenized(
        ids=np.concatenate([np.asarray(one.ids, np.int32) for one in encoded]),
        codes=codes.astype(np.uint8),
        lengths=lengths,
        rows=rows,
        targets=np.asarray([np.count_nonzero(one.mask[1:]) for one in encoded], np.int32),
        weights=weights,
        num_rows=len(encoded),
        num_refused=0,
        refused=[],
        tally=Tally(),
    )
    return Examples((part,), np.zeros(len(encoded), np.int32), _starts(lengths), lengths, rows, (name,), (1.0,), ())


def encode_sources(
    sources: Sequence[Source],
    encoder: Encoder,
    max_length: int,
    overlong: str = "drop",
    progress: Callable[[int], object] = lambda rows: None,
    *,
    on_bad_row: str = "error",
    num_workers: int | None = 1,
    cache: bool = False,
    refuse: bool = True,
) -> tuple[Examples, Report]:
    """Encode all rows of all sources; ``overlong`` determines what happens to examples longer than ``max_length`` ids.

    ``truncate`` cuts the end and adds no stop token to a cut answer, which would teach the model to stop early; an
    example without supervised tokens after truncation is dropped.

    Args:
        progress: called with the number of rows done since the last call.
        on_bad_row: ``error``, or ``skip`` to skip and count rows that cannot be verified.
        num_workers: processes that tokenize; None chooses by the number of rows and cores.
        cache: whether to cache the result for later runs.
        refuse: if False, bad rows are only reported; :func:`refuse_bad` can refuse them later.

    Raises:
        UserError: a row cannot be encoded (names file and row), a row is overlong under ``error``, or no example is
            left.
    """
    report = Report()
    parts: list[Tokenized] = []
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    stops_early = refuse and on_bad_row == "error"
    for index, source in enumerate(sources):
        part, origin = tokenise(source, encoder, num_workers, cache, stops_early, progress)
        one = SourceReport(source.name, source.format, part.num_rows, part.num_refused, len(part.lengths))
        one.reasons, one.origin, one.passed_over = part.refused, origin, source.passed_over
        one.label = source.label
        one.unread = dict(sorted(part.tally.unread.items()))
        report.sources.append(one)
        report.tally.add(part.tally)
        parts.append(part)
        if refuse:
            refuse_bad(report, on_bad_row)
        starts, lengths, rows = _fit(part, source.name, max_length, overlong, one)
        columns.append((np.full(len(starts), index, np.int32), starts, lengths, rows))
    if refuse:
        refuse_empty(report, max_length)
    source_column, starts, lengths, rows = (np.concatenate(column) for column in zip(*columns, strict=True))
    examples = Examples(
        parts=tuple(parts),
        source=source_column,
        starts=starts,
        lengths=lengths,
        row=rows,
        names=tuple(source.name for source in sources),
        weights=tuple(source.weight for source in sources),
        stop_ids=tuple(stop for stop, _ in report.tally.stops.most_common()),
        labels=tuple(source.group for source in sources),
    )
    tokens = encoder.tokenizer.convert_ids_to_tokens
    report.stop_tokens = {tokens(stop): count for stop, count in report.tally.stops.most_common()}
    return examples, report


def refuse_bad(report: Report, on_bad_row: str) -> None:
    """Refuse data with bad rows, unless ``on_bad_row`` is ``skip``.

    Raises:
        UserError: there is a bad row; the error names the first one.
    """
    if on_bad_row == "skip":
        return
    for source in report.sources:
        if source.refused:
            raise UserError(source.reasons[0].at(source.name))


def refuse_empty(report: Report, max_length: int) -> None:
    """Refuse data without any kept example.

    Raises:
        UserError: no example is kept.
    """
    if report.total("kept"):
        return
    names = ", ".join(source.name for source in report.sources)
    rows, refused = report.total("rows"), report.total("refused")
    if refused == rows:
        first = next(source for source in report.sources if source.reasons)
        raise UserError(f"{names}: all {rows} rows are refused; the first: {first.reasons[0].at(first.name)}")
    counted = f"{rows - refused} rows that are not refused" if refused else f"{rows} rows"
    what = "longer than" if report.total("dropped") else "without a supervised token once they are cut to"
    raise UserError(f"{names}: all {counted} are {what} data.max_length {max_length}; increase it")


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[:-1].astype(np.int64)


def _fit(
    part: Tokenized, name: str, max_length: int, overlong: str, report: SourceReport
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drop or truncate the overlong examples of one source; returns starts, lengths and rows of the kept ones."""
    lengths, targets = np.asarray(part.lengths), np.asarray(part.targets)
    starts, rows = _starts(lengths), np.asarray(part.rows)
    too_long = np.flatnonzero(lengths > max_length)
    keep = np.ones(len(lengths), bool)
    if len(too_long):
        if overlong == "error":
            first = int(too_long[0])
            raise UserError(
                f"{name} row {rows[first]}: {lengths[first]} tokens are more than data.max_length {max_length}; "
                "increase it, or set data.overlong to drop or truncate"
            )
        before = targets[too_long]
        if overlong == "drop":
            keep[too_long] = False
            report.dropped = len(too_long)
            report.targets_lost = int(before.sum())
        else:
            lengths, targets = lengths.copy(), targets.copy()
            lengths[too_long] = max_length
            is_supervised = part.weights > 0
            after = [is_supervised[part.codes[starts[i] + 1 : starts[i] + max_length]].sum() for i in too_long]
            targets[too_long] = after
            keep[too_long] = targets[too_long] > 0
            report.truncated = int(keep[too_long].sum())
            report.dropped_without_targets = len(too_long) - report.truncated
            report.targets_lost = int((before - targets[too_long]).sum())
    report.kept = int(keep.sum())
    report.tokens, report.targets = int(lengths[keep].sum()), int(targets[keep].sum())
    return starts[keep], lengths[keep], rows[keep]
