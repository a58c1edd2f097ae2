"""What a file of text is, where it is not UTF-8."""

from __future__ import annotations

from pathlib import Path

from sft_jax.errors import UserError, refuse_lfs_pointer

_SAMPLE = 4096


def not_utf8(data: bytes) -> str:
    """What to say of bytes that are not UTF-8."""
    if _is_utf16(data):
        kind = "UTF-16"
    else:
        try:
            data.decode("cp1252")
        except UnicodeDecodeError:
            return "not valid UTF-8"
        kind = "CP1252"  # what Windows writes; almost every byte is a character of it
    return f"not valid UTF-8, it seems to be {kind}; convert it: iconv -f {kind} -t UTF-8"


def check_first_bytes(path: Path, name: str) -> None:
    """Refuse what the first bytes give away before a row is read.

    Raises:
        UserError: a pointer of git-lfs in place of the file, or UTF-16.
    """
    with path.open("rb") as file:
        first = file.read(_SAMPLE)
    refuse_lfs_pointer(first, name)
    if path.suffix in (".jsonl", ".json", ".csv") and _is_utf16(first):
        raise UserError(f"{name}: {not_utf8(first)}")


def _is_utf16(data: bytes) -> bool:
    """Whether there is a byte order mark, or every other byte is zero, as in most texts of Western languages."""
    zeros = [data[i:_SAMPLE:2].count(0) for i in (0, 1)]
    return data[:2] in (b"\xff\xfe", b"\xfe\xff") or (min(zeros) == 0 and max(zeros) > len(data[:_SAMPLE]) // 4)
