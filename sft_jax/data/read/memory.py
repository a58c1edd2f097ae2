"""Writes rows from memory to a file in the cache, so that all other code reads files only."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sft_jax.config import SourceConfig
from sft_jax.data.read.folders import cache_folder
from sft_jax.errors import UserError


def write_source(rows: Iterable[Mapping[str, Any]], name: str) -> SourceConfig:
    """Write rows to a file in the cache, and return it as a source.

    The file name contains a hash of the rows, so a run with the same rows can resume.

    Args:
        rows: dicts of JSON values, or a Hugging Face dataset.
        name: name of the argument, for error messages.

    Raises:
        UserError: a row is not a dict, a value cannot be written as JSON, or there are no rows.
    """
    folder = cache_folder() / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    digest, num_rows = hashlib.sha256(), 0
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".partial", delete=False) as file:
        partial = Path(file.name)
        try:
            for num_rows, row in enumerate(rows, start=1):
                line = _as_line(row, f"{name} row {num_rows - 1}")
                digest.update(line)
                file.write(line)
            if not num_rows:
                raise UserError(f"{name}: has no rows")
        except BaseException:
            partial.unlink()
            raise
    path = folder / f"{name}-{digest.hexdigest()[:16]}.jsonl"
    partial.replace(path)
    return SourceConfig(path=str(path))


def _as_line(row: Any, where: str) -> bytes:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: is a {type(row).__name__}, not a dict")
    try:
        return json.dumps(dict(row), ensure_ascii=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: cannot be written as JSON: {error}") from error
