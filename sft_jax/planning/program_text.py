"""Compiles a program and reads its optimized HLO text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

_AFTER = ("after_codegen", "after_optimizations")  # only the first has the compiler's estimates of cycles


def compile_with_text(lowered: Any, platform: str) -> tuple[Any, str | None]:
    """Returns the compiled program and its HLO text; None where the compiler writes none.

    On TPU the compiler dumps the text to a file, because ``as_text()`` fails on asynchronous operations that jaxlib
    does not support (``async-update`` on v5p and v6e, jaxlib 0.10.2).
    """
    if platform != "tpu":
        program = lowered.compile()
        return program, program.as_text()
    with tempfile.TemporaryDirectory() as folder:
        program = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        for stage in _AFTER:
            written = sorted(Path(folder).glob(f"*.{stage}.txt"), key=lambda path: path.stat().st_size)
            if written:
                return program, written[-1].read_text(encoding="utf-8")
        return program, None
