"""Opens sources of rows: files, folders, globs, remote storage, and Hugging Face datasets."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_jax import builtin
from sft_jax.config import SourceConfig
from sft_jax.data.read.arrow_files import ArrowTable, start_reader
from sft_jax.data.read.folders import scratch_folder
from sft_jax.data.read.formats import (
    COLUMNS,
    FORMATS,
    detect,
    is_message,
    likely_columns,
    missing_column,
    parse,
    suggestion,
)
from sft_jax.data.read.rows import Row, RowError
from sft_jax.data.read.tables import Table, kind_of, open_file
from sft_jax.errors import UserError
from sft_jax.files.buckets import is_url
from sft_jax.redaction import with_secrets, without_secrets

_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLIT = re.compile(r"(?:^|[-_.])((?:train|test|validation|valid|val|dev|eval)(?:_(?:sft|gen|prefs))?)(?=[-_.]|$)")
_NUM_DETECTED = 100  # rows that are read to detect the format
# Names and tables, and the skipped files of other splits; None if the file names contain no splits.
_Opened = tuple[list[tuple[str, Table]], tuple[str, ...] | None]
_fetched: dict[tuple[str, str], Path] = {}  # local copies of remote files, by URL and version


@dataclass(frozen=True)
class Source:
    """The rows of one file or one Hugging Face split."""

    name: str
    table: Table
    format: str
    weight: float = 1.0
    max_rows: int | None = None
    columns: dict[str, str] = field(default_factory=dict)  # name in the format to name in the file
    ignore_columns: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()  # skipped files of other splits in the same folder
    given: str = ""  # the path in the config, which may match several files
    label: str | None = None  # the label in the config
    is_held_out: bool = False  # whether its rows may have several accepted answers

    @property
    def group(self) -> str:
        """Its name in metrics and reports; sources of the same group are one set."""
        return self.label or self.given or self.name

    def __len__(self) -> int:
        return len(self.table) if self.max_rows is None else min(self.max_rows, len(self.table))

    def read(self, start: int, stop: int, keep_reasoning: bool = True) -> Iterator[Row | RowError]:
        """Read and parse rows ``start … stop``; yields an error for a row that cannot be used."""
        for raw in self.table.read(start, min(stop, len(self))):
            if isinstance(raw, RowError):
                yield raw
                continue
            try:
                row = _renamed(raw, self.columns)
                yield parse(self.format, row, keep_reasoning, self.ignore_columns, self.is_held_out)
            except RowError as error:
                yield error

    def row(self, index: int, keep_reasoning: bool = True) -> Row:
        """Read and parse one row.

        Raises:
            UserError: the row cannot be used.
        """
        row = next(self.read(index, index + 1, keep_reasoning))
        if isinstance(row, RowError):
            raise UserError(row.at(self.name, index))
        return row


def open_sources(sources: Sequence[SourceConfig], is_held_out: bool = False) -> list[Source]:
    """Open sources. A folder or a glob gives one source per file, sorted by name.

    Args:
        is_held_out: whether rows may have several accepted answers.

    Raises:
        UserError: a source does not exist, cannot be parsed (names file and line), has no rows, or an unknown format.
    """
    opened = []
    for source in sources:
        tables, passed_over = _open(_with_secrets(source))
        for name, table in tables:
            name = without_secrets(name)
            if len(table) == 0:
                raise UserError(f"{name}: has no rows")
            opened.append(
                Source(
                    name, table, _format(name, table, source), source.weight, source.max_rows, dict(source.columns),
                    tuple(source.ignore_columns), passed_over or (), source.path, source.label, is_held_out,
                )
            )  # fmt: skip
            passed_over = None
    return opened


def with_likely_columns(source: SourceConfig) -> SourceConfig:
    """The same source with a guess of ``columns`` where its format is unknown.

    Raises:
        UserError: the source does not exist, or cannot be read.
    """
    for name, table in _open(_with_secrets(source))[0]:
        try:
            _format(without_secrets(name), table, source)
        except UserError:
            first = next((row for row in table.read(0, 1) if not isinstance(row, RowError)), {})
            if likely := likely_columns({*table.columns(), *first}):
                return dataclasses.replace(source, columns=likely)
        break
    return source


def _with_secrets(source: SourceConfig) -> SourceConfig:
    """Replace the environment variables of a path that hold secrets by their values."""
    try:
        return dataclasses.replace(source, path=with_secrets(source.path))
    except KeyError as error:
        raise UserError(f"data: {source.path}: the environment variable {error} is not set") from error


def prepare_to_open(sources: Sequence[SourceConfig]) -> None:
    """Start what :func:`open_sources` will need, so that it need not wait for it."""
    if any(kind_of(one.path) in (".parquet", ".arrow") or os.path.isdir(one.path) for one in sources):
        start_reader()


def _open(source: SourceConfig) -> _Opened:
    tables, passed_over = _find(source)
    if not any(isinstance(table, ArrowTable) and table.is_dataset for _, table in tables):
        for key in ("name", "split", "revision"):
            if getattr(source, key) != getattr(SourceConfig(source.path), key) and not (
                key == "split" and passed_over is not None
            ):
                raise UserError(
                    f"data.*.{key}: {getattr(source, key)!r} is for Hugging Face dataset ids, but {source.path} is "
                    "read as files"
                )
    return tables, passed_over


def _find(source: SourceConfig) -> _Opened:
    if not source.path or "\0" in source.path:
        raise UserError(f"data.*.path: {source.path!r} is not the name of a file")
    try:
        return _find_files(source)
    except OSError as error:  # such as a name that is too long
        raise UserError(f"data: {source.path[:200]}: {error.strerror or error}") from error


def _find_files(source: SourceConfig) -> _Opened:
    if source.path.startswith(builtin.PREFIX):
        return [(source.path, open_file(builtin.locate(source.path, "data"), source.path))], None
    if is_url(source.path):
        return _open_remote(source)
    path = Path(source.path).expanduser()
    if path.is_file():
        return [(source.path, open_file(path, source.path))], None
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return [(source.path, ArrowTable(path, source.path, "saved", {"split": source.split}))], None
        files = _data_files(path)
        if not files:
            raise UserError(f"data: folder {source.path} has no {', '.join(_KINDS)} file")
        files, passed_over = _select_split(files, source)
        return [(name, open_file(Path(name), name)) for name in files], passed_over
    files = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if files:
        return [(file, open_file(Path(file), file)) for file in files], None
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path) and kind_of(path.name) not in _KINDS:
        configuration = "" if source.name is None else f"{source.name}, "
        return [(f"{source.path}[{configuration}{source.split}]", _open_hub(source))], None
    raise UserError(f"data: {source.path!r} matches no file, folder or glob, and is not a Hugging Face dataset id")


def _data_files(folder: Path) -> list[str]:
    """List the data files of a folder, or of its subfolder ``data`` as in repositories of the Hub."""
    for directory in (folder, folder / "data"):
        if directory.is_dir():
            names = (one for one in directory.iterdir() if kind_of(one.name) in _KINDS and one.name not in _METADATA)
            if files := sorted(map(str, names)):
                return files
    return []


def _select_split(files: Sequence[str], source: SourceConfig) -> tuple[list[str], tuple[str, ...] | None]:
    """Select the files of one split by their names (``train-00000-of-00002.parquet``, ``test.jsonl``).

    Returns:
        The files to read, and the names of the skipped ones. If no name contains a split, all files and None.

    Raises:
        UserError: there are splits, but no file of this one.
    """
    splits = {file: next(iter(_SPLIT.findall(Path(file).name.lower())), None) for file in files}
    available = sorted({split for split in splits.values() if split})
    if not available:
        return [*files], None
    selected = [file for file, split in splits.items() if split in (None, source.split.lower())]
    if not selected:
        raise UserError(
            f"{source.path}: has no file of the split {source.split!r}; there are {', '.join(available)} (set "
            "data.*.split, or the path of a file)"
        )
    return selected, tuple(Path(file).name for file in files if file not in selected)


def _open_remote(source: SourceConfig) -> _Opened:
    """Copy the files of ``gs://``, ``s3://`` or another fsspec storage to a temporary folder, and open them."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(source.path)
        fs.invalidate_cache()
        passed_over = None
        if fs.isdir(path):
            files = sorted(
                one for one in fs.ls(path, detail=False) if kind_of(one) in _KINDS and Path(one).name not in _METADATA
            )
            files, passed_over = _select_split(files, source)
        else:
            files = sorted(fs.glob(path))
        if not files:
            raise UserError(f"data: no files at {source.path}")
        opened = []
        for file in files:
            name = fs.unstrip_protocol(file)
            version = (name, json.dumps(fs.info(file), sort_keys=True, default=str))
            if version not in _fetched:  # streaming opens each source twice: once to check its first rows
                target = scratch_folder() / Path(file).name
                fs.get_file(file, str(target))
                _fetched[version] = target
            opened.append((name, open_file(_fetched[version], name)))
        return opened, passed_over
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"data: {source.path}: {' '.join(str(error).split())}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"data: {source.path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _open_hub(source: SourceConfig) -> Table:
    options = {"split": source.split, "name": source.name, "revision": source.revision}
    details = f"(name {source.name or 'null'}, split {source.split})"
    try:
        return ArrowTable(source.path, repr(source.path), "hub", options)
    except UserError as error:
        raise UserError(
            f"data: {source.path!r} {details} is not a local file and could not be fetched: {error}"
        ) from error


def _renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    if not columns:
        return row
    taken = set(columns.values())
    renamed = {name: value for name, value in row.items() if name not in taken and name not in columns}
    return renamed | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def _format(name: str, table: Table, source: SourceConfig) -> str:
    """Return the configured row format, or detect it from the non-null columns of the first rows."""
    unknown = sorted(set(source.columns) - set(COLUMNS))
    if unknown:
        raise UserError(
            f"data.*.columns: {unknown[0]!r} is not a column of any format; the columns are {', '.join(COLUMNS)}"
        )
    first_error: RowError | None = None
    columns, non_null, seen = _renamed_set(table.columns(), source.columns), set[str](), set(table.columns())
    for row in table.read(0, _NUM_DETECTED):
        if isinstance(row, RowError):
            first_error = first_error or row
            continue
        seen |= row.keys()
        columns = columns or _renamed_set(row, source.columns)
        non_null = non_null or {name for name, value in _renamed(row, source.columns).items() if value is not None}
        if detect(non_null) is None:
            non_null = set()
        elif seen.issuperset(source.columns.values()):
            break
    absent = sorted(set(source.columns.values()) - seen)
    shown = ", ".join(sorted(seen))
    if seen and absent:
        raise UserError(f"{name}: data.*.columns names the column {absent[0]!r}, but this file has {shown}")
    if first_error is not None and not columns:
        raise UserError(first_error.at(name, 0))
    if source.format != "auto":
        missing = missing_column(source.format, columns)
        if missing is not None:
            raise UserError(f"{name}: format {source.format!r} needs the column {missing!r}, but this file has {shown}")
        return source.format
    detected = detect(non_null) or detect(columns)
    if detected in (None, "text") and is_message(columns):
        raise UserError(
            f"{name}: each row is a single message of a conversation tree (its columns are {shown}); join each path "
            "from a root to a leaf into one row with 'messages'"
        )
    if detected is None:
        raise UserError(
            f"{name}: no known format in the columns {shown}; {suggestion(columns)} (formats: {', '.join(FORMATS)})"
        )
    return detected


def _renamed_set(names: Iterable[str], columns: dict[str, str]) -> set[str]:
    return set(_renamed(dict.fromkeys(names), columns))
