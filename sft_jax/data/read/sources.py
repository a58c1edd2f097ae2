"""Where rows come from: files, folders, globs, remote storage, and Hugging Face datasets."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_jax import builtin
from sft_jax.config import SourceConfig
from sft_jax.data.read.folders import scratch_folder
from sft_jax.data.read.formats import COLUMNS, FORMATS, detect, is_message, missing_column, parse, suggestion
from sft_jax.data.read.rows import Row, RowError
from sft_jax.data.read.tables import Dataset, Table, kind_of, open_file
from sft_jax.errors import UserError
from sft_jax.files.buckets import is_url

_KINDS = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # about a data set
_SPLIT = re.compile(r"(?:^|[-_.])((?:train|test|validation|valid|val|dev|eval)(?:_(?:sft|gen|prefs))?)(?=[-_.]|$)")
_TRIED = 100  # rows that are looked at to tell the format
# Names and tables, and the files beside them that are of another split; None where names tell no splits.
Found = tuple[list[tuple[str, Table]], tuple[str, ...] | None]
_fetched: dict[tuple[str, str], Path] = {}  # remote files by address and version, copied by this process


@dataclass(frozen=True)
class Source:
    """The rows of one file or one Hugging Face split."""

    name: str
    table: Table
    format: str
    weight: float = 1.0
    max_rows: int | None = None
    columns: dict[str, str] = field(default_factory=dict)  # our name of a column to the file's
    ignore_columns: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()  # files beside this one that are of another split
    given: str = ""  # the path in the config, which may stand for several files

    def __len__(self) -> int:
        return len(self.table) if self.max_rows is None else min(self.max_rows, len(self.table))

    def read(self, start: int, stop: int, keep_reasoning: bool = True) -> Iterator[Row | RowError]:
        """What rows ``start … stop`` say; one that says nothing usable is given as the reason why."""
        for given in self.table.read(start, min(stop, len(self))):
            if isinstance(given, RowError):
                yield given
                continue
            try:
                yield parse(self.format, _renamed(given, self.columns), keep_reasoning, self.ignore_columns)
            except RowError as error:
                yield error

    def row(self, index: int, keep_reasoning: bool = True) -> Row:
        """One row.

        Raises:
            UserError: it cannot be used.
        """
        found = next(self.read(index, index + 1, keep_reasoning))
        if isinstance(found, RowError):
            raise UserError(found.at(self.name, index))
        return found


def open_sources(sources: Sequence[SourceConfig]) -> list[Source]:
    """Open every source; a folder or glob becomes one entry a file, in the order of the file names.

    Raises:
        UserError: nothing there, a file that cannot be parsed (file and line), no rows, or no known format.
    """
    opened = []
    for source in sources:
        found, passed_over = _open(source)
        for name, table in found:
            if len(table) == 0:
                raise UserError(f"{name}: has no rows")
            opened.append(
                Source(
                    name, table, _format(name, table, source), source.weight, source.max_rows, dict(source.columns),
                    tuple(source.ignore_columns), passed_over or (), source.path,
                )
            )  # fmt: skip
            passed_over = None
    return opened


def _open(source: SourceConfig) -> Found:
    found, passed_over = _find(source)
    if not any(isinstance(table, Dataset) for _, table in found):
        for key in ("name", "split", "revision"):
            if getattr(source, key) != getattr(SourceConfig(source.path), key) and not (
                key == "split" and passed_over is not None
            ):
                raise UserError(
                    f"data.*.{key}: {getattr(source, key)!r} is for Hugging Face dataset ids, and {source.path} is "
                    "taken file by file"
                )
    return found, passed_over


def _find(source: SourceConfig) -> Found:
    if source.path.startswith(builtin.PREFIX):
        return [(source.path, open_file(builtin.locate(source.path, "data"), source.path))], None
    if is_url(source.path):
        return _open_remote(source)
    path = Path(source.path).expanduser()
    if path.is_file():
        return [(source.path, open_file(path, source.path))], None
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return [(source.path, Dataset(_load_saved(path, source)))], None
        files = _data_files(path)
        if not files:
            raise UserError(f"data: folder {source.path} has no {', '.join(_KINDS)} file")
        files, left = _of_split(files, source)
        return [(name, open_file(Path(name), name)) for name in files], left
    files = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if files:
        return [(file, open_file(Path(file), file)) for file in files], None
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path) and kind_of(path.name) not in _KINDS:
        of_several = "" if source.name is None else f"{source.name}, "
        return [(f"{source.path}[{of_several}{source.split}]", Dataset(_read_hub(source)))], None
    raise UserError(f"data: no file, folder or glob {source.path!r}, and not a Hugging Face dataset id")


def _data_files(folder: Path) -> list[str]:
    """The files of rows in a folder, or in its folder ``data`` as the Hub has them."""
    for place in (folder, folder / "data"):
        if place.is_dir():
            found = (file for file in place.iterdir() if kind_of(file.name) in _KINDS and file.name not in _NOT_ROWS)
            if files := sorted(map(str, found)):
                return files
    return []


def _of_split(files: Sequence[str], source: SourceConfig) -> tuple[list[str], tuple[str, ...] | None]:
    """Of files whose names tell their splits (``train-00000-of-00002.parquet``, ``test.jsonl``) those of one split.

    Returns:
        The files to read, and those left out; all are read, and None is left out, where no name tells a split.

    Raises:
        UserError: there are splits, and not this one.
    """
    splits = {file: next(iter(_SPLIT.findall(Path(file).name.lower())), None) for file in files}
    told = sorted({split for split in splits.values() if split})
    if not told:
        return [*files], None
    found = [file for file, split in splits.items() if split in (None, source.split.lower())]
    if not found:
        raise UserError(
            f"{source.path}: has no file of the split {source.split!r}; there are {', '.join(told)} (data.*.split, or "
            "the path of a file)"
        )
    return found, tuple(Path(file).name for file in files if file not in found)


def _open_remote(source: SourceConfig) -> Found:
    """Files of ``gs://``, ``s3://`` or another storage that fsspec knows, copied to a temporary folder."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(source.path)
        fs.invalidate_cache()
        left = None
        if fs.isdir(path):
            found = sorted(
                one for one in fs.ls(path, detail=False) if kind_of(one) in _KINDS and Path(one).name not in _NOT_ROWS
            )
            found, left = _of_split(found, source)
        else:
            found = sorted(fs.glob(path))
        if not found:
            raise UserError(f"data: nothing there: {source.path}")
        opened = []
        for one in found:
            name = fs.unstrip_protocol(one)
            version = (name, json.dumps(fs.info(one), sort_keys=True, default=str))
            if version not in _fetched:  # a stream opens its sources twice: their first rows before all of them
                target = scratch_folder() / Path(one).name
                fs.get_file(one, str(target))
                _fetched[version] = target
            opened.append((name, open_file(_fetched[version], name)))
        return opened, left
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"data: {source.path}: {' '.join(str(error).split())}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"data: {source.path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _load_saved(path: Path, source: SourceConfig) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as a saved dataset: {' '.join(str(error).split())[:200]}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            raise UserError(f"{path}: has no split {source.split!r}; there are {', '.join(map(str, loaded))}")
        return loaded[source.split]
    return loaded


def _read_hub(source: SourceConfig) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    with _quiet_datasets():
        try:
            return datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
        except (DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            asked = f"(name {source.name or 'null'}, split {source.split})"
            raise UserError(
                f"data: {source.path!r} {asked} is no local file and could not be fetched: {reason}"
            ) from error


class _quiet_datasets:
    """No progress bars and no log lines of ``datasets`` while it reads: failures are told by our own line."""

    def __enter__(self) -> None:
        import datasets

        self._verbosity = datasets.logging.get_verbosity()
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)

    def __exit__(self, *exc: object) -> None:
        import datasets

        datasets.logging.set_verbosity(self._verbosity)
        datasets.enable_progress_bars()


def _renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    if not columns:
        return row
    taken = set(columns.values())
    renamed = {name: value for name, value in row.items() if name not in taken and name not in columns}
    return renamed | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def _format(name: str, table: Table, source: SourceConfig) -> str:
    """The row format: by name where it is given, else by the columns of the first row that has values in them."""
    unknown = sorted(set(source.columns) - set(COLUMNS))
    if unknown:
        raise UserError(f"data.*.columns: {unknown[0]!r} is no column of a format; there are {', '.join(COLUMNS)}")
    first: RowError | None = None
    have, valued, seen = _renamed_set(table.columns(), source.columns), set[str](), set(table.columns())
    for row in table.read(0, _TRIED):
        if isinstance(row, RowError):
            first = first or row
            continue
        seen |= row.keys()
        have = have or _renamed_set(row, source.columns)
        valued = valued or {name for name, value in _renamed(row, source.columns).items() if value is not None}
        if detect(valued) is None:
            valued = set()
        elif seen.issuperset(source.columns.values()):
            break
    lacking = sorted(set(source.columns.values()) - seen)
    shown = ", ".join(sorted(seen))
    if seen and lacking:
        raise UserError(f"{name}: data.*.columns names the column {lacking[0]!r}; this file has {shown}")
    if first is not None and not have:
        raise UserError(first.at(name, 0))
    if source.format != "auto":
        missing = missing_column(source.format, have)
        if missing is not None:
            raise UserError(f"{name}: format {source.format!r} needs the column {missing!r}; this file has {shown}")
        return source.format
    found = detect(valued) or detect(have)
    if found in (None, "text") and is_message(have):
        raise UserError(
            f"{name}: each row is one message of a tree (its columns are {shown}), and not a conversation; join each "
            "path from a root to a row of 'messages'"
        )
    if found is None:
        raise UserError(
            f"{name}: no known format in the columns {shown}; {suggestion(have)} (known are {', '.join(FORMATS)})"
        )
    return found


def _renamed_set(names: Iterable[str], columns: dict[str, str]) -> set[str]:
    return set(_renamed(dict.fromkeys(names), columns))
