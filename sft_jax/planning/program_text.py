"""A program, and its text as the compiler leaves it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any


def compile_with_text(lowered: Any, platform: str) -> tuple[Any, str | None]:
    """Compile, and read what the compiler made of it; None where it does not say.

    The TPU compiler is asked to write its text down: asking the program for it fails for chips with asynchronous
    operations that jaxlib does not know (``async-update`` on v5p, jaxlib 0.10.2).
    """
    if platform != "tpu":
        program = lowered.compile()
        return program, program.as_text()
    with tempfile.TemporaryDirectory() as folder:
        program = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        written = sorted(Path(folder).glob("*.after_optimizations.txt"), key=lambda path: path.stat().st_size)
        return program, written[-1].read_text(encoding="utf-8") if written else None
