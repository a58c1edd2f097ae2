"""Rows that are given in memory, kept as a file: whatever reads, counts or resumes data then needs one way only."""

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


def source_of(rows: Iterable[Mapping[str, Any]], name: str) -> SourceConfig:
    """A source with these rows, in a file of the cache whose name tells its content.

    The same rows make the same file, so that a run of them resumes.

    Args:
        rows: dicts of JSON values, or a dataset of Hugging Face.
        name: of the argument, for messages.

    Raises:
        UserError: a row that is no dict, a value that JSON cannot hold, or no rows.
    """
    folder = cache_folder() / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    seen, num = hashlib.sha256(), 0
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".partial", delete=False) as file:
        partial = Path(file.name)
        try:
            for num, row in enumerate(rows, start=1):
                line = _as_line(row, f"{name} row {num - 1}")
                seen.update(line)
                file.write(line)
            if not num:
                raise UserError(f"{name}: has no rows")
        except BaseException:
            partial.unlink()
            raise
    path = folder / f"{name}-{seen.hexdigest()[:16]}.jsonl"
    partial.replace(path)
    return SourceConfig(path=str(path))


def _as_line(row: Any, where: str) -> bytes:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: is a {type(row).__name__}, not a dict")
    try:
        return json.dumps(dict(row), ensure_ascii=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: cannot be written as JSON: {error}") from error
