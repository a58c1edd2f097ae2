"""Rows of files, folders, globs and Hugging Face datasets."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_jax import builtin
from sft_jax.config import SourceConfig
from sft_jax.errors import UserError

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Rows:
    """The rows of one file or one Hugging Face split, read lazily from Arrow."""

    name: str
    rows: Any  # datasets.Dataset: len(), slicing to a dict of columns, iteration over dicts
    format: str
    weight: float


def open_sources(sources: Sequence[SourceConfig]) -> list[Rows]:
    """Open every source; a folder or glob becomes one entry a file, in the order of the file names.

    Raises:
        UserError: nothing there, a file that cannot be parsed (file and line), or no rows.
    """
    opened = []
    for source in sources:
        for name, rows in _open(source):
            if len(rows) == 0:
                raise UserError(f"{name}: has no rows")
            opened.append(Rows(name, rows, _detect(name, rows, source.format), source.weight))
    return opened


def _open(source: SourceConfig) -> list[tuple[str, Any]]:
    if source.path.startswith(builtin.PREFIX):
        return [(source.path, _read_file(builtin.locate(source.path, "data")))]
    path = Path(source.path).expanduser()
    if path.is_file():
        return [(source.path, _read_file(path))]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _BUILDERS)
        if not files:
            raise UserError(f"data: folder {source.path} has no {', '.join(_BUILDERS)} file")
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if files:
        return [(str(file), _read_file(file)) for file in files]
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path) and path.suffix not in _BUILDERS:
        return [(f"{source.path}[{source.split}]", _read_hub(source))]
    raise UserError(f"data: no file, folder or glob {source.path!r}, and not a Hugging Face dataset id")


def _read_file(path: Path) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    builder = _BUILDERS.get(path.suffix)
    if builder is None:
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; supported are {', '.join(_BUILDERS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: has no rows")
    with _quiet_datasets():
        try:
            return datasets.load_dataset(builder, data_files=str(path), split="train")
        except (DatasetsError, ValueError, OSError) as error:
            if builder == "json":
                _name_malformed_line(path)
            cause = error.__cause__ or error
            raise UserError(f"{path}: cannot be read as {builder}: {' '.join(str(cause).split())[:200]}") from error


def _read_hub(source: SourceConfig) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    with _quiet_datasets():
        try:
            return datasets.load_dataset(source.path, split=source.split, revision=source.revision)
        except (DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"data: {source.path!r} is no local file and could not be fetched: {reason}") from error


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


def _name_malformed_line(path: Path) -> None:
    """Raise with the line number where JSON ends to be JSON; return if every line, or the file as a whole, parses."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not valid UTF-8") from error
    if path.suffix == ".json":
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno})") from error


def _detect(name: str, rows: Any, given: str) -> str:
    """The row format: by name where it is given, else by the columns there are."""
    columns = set(rows.column_names)
    needed = {"messages": {"messages"}, "prompt-completion": {"prompt", "completion"}, "text": {"text"}}
    if given != "auto":
        missing = sorted(needed[given] - columns)
        if missing:
            have = ", ".join(sorted(columns))
            raise UserError(f"{name}: format {given!r} needs the column {missing[0]!r}; this file has {have}")
        return given
    for kind, names in needed.items():
        if names <= columns:
            return kind
    raise UserError(
        f"{name}: no known format in the columns {', '.join(sorted(columns))}; "
        "supported are messages, prompt + completion, text"
    )
