"""Detects the encoding of text files that are not UTF-8."""

from __future__ import annotations

from pathlib import Path

from sft_jax.errors import UserError, refuse_lfs_pointer

_SAMPLE = 4096


def not_utf8(data: bytes) -> str:
    """Return an error message for bytes that are not UTF-8."""
    if _is_utf16(data):
        kind = "UTF-16"
    else:
        try:
            data.decode("cp1252")
        except UnicodeDecodeError:
            return "not valid UTF-8"
        kind = "CP1252"  # the default of Windows; almost every byte is valid in it
    return f"not valid UTF-8, probably {kind}; convert it with iconv -f {kind} -t UTF-8"


def check_first_bytes(path: Path, name: str) -> None:
    """Check the first bytes of a file.

    Raises:
        UserError: the file is a git-lfs pointer, or UTF-16.
    """
    with path.open("rb") as file:
        first = file.read(_SAMPLE)
    refuse_lfs_pointer(first, name)
    if path.suffix in (".jsonl", ".json", ".csv", ".tsv") and _is_utf16(first):
        raise UserError(f"{name}: {not_utf8(first)}")


def _is_utf16(data: bytes) -> bool:
    """Whether there is a byte order mark, or every other byte is mostly zero, as in text in Latin script."""
    zeros = [data[i:_SAMPLE:2].count(0) for i in (0, 1)]
    return data[:2] in (b"\xff\xfe", b"\xfe\xff") or (min(zeros) == 0 and max(zeros) > len(data[:_SAMPLE]) // 4)
