"""Compiles a program and reads its optimized HLO text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any


def compile_with_text(lowered: Any, platform: str) -> tuple[Any, str | None]:
    """Returns the compiled program and its HLO text; None where the compiler writes none.

    On TPU the compiler dumps the text to a file, because ``as_text()`` fails on asynchronous operations that jaxlib
    does not support (``async-update`` on v5p, jaxlib 0.10.2).
    """
    if platform != "tpu":
        program = lowered.compile()
        return program, program.as_text()
    with tempfile.TemporaryDirectory() as folder:
        program = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        written = sorted(Path(folder).glob("*.after_optimizations.txt"), key=lambda path: path.stat().st_size)
        return program, written[-1].read_text(encoding="utf-8") if written else None
