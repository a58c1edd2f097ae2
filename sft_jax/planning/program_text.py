"""The compiler's text of a program."""

from __future__ import annotations

from typing import Any


def program_text(program: Any) -> str | None:
    """The optimised program as text; None where the compiler does not give it."""
    return program.as_text()
