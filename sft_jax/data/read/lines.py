"""Reads small JSON Lines files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft_jax.errors import UserError


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a ``.jsonl`` file; skips empty lines.

    Raises:
        UserError: the file does not exist or has no rows, or a line is not a JSON object; the error names the line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: has no rows")
    return rows
