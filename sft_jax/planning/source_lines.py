"""Source lines of the instructions in a program's text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath

from sft_jax.planning.hlo import Instruction

_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_ROW = re.compile(r"(\d+) (.*)")
_NUMBER = re.compile(r"(\w+)=(\d+)")
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
_LINE = re.compile(r'\bsource_file="([^"]*)" source_line=(\d+)')
_LIBRARIES = re.compile(r"/(?:(?:jax|jaxlib|flax|optax)/|contextlib\.py$|functools\.py$)")
_COMPILES = "/sft_jax/planning/"  # this file's folder: it called the program, and is no part of it
_CALLERS = 4  # files: the one of the line, and those that called it
_PACKAGE = "/sft_jax/"


class SourceLines:
    """The tables of stack frames at the head of a program's text."""

    def __init__(self, text: str) -> None:
        self._tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
        current = None
        for line in text.splitlines():
            if line in self._tables:
                current = self._tables[line]
            elif line.startswith(("ENTRY", "%", " ")):
                break  # the tables come before the first computation
            elif current is not None and (match := _ROW.match(line)):
                current[int(match[1])] = match[2]
        # Some versions count the frame that called from one and write zero for none, others add one to both.
        self._none = min((self._caller(frame) for frame in self._tables["StackFrames"]), default=0)

    def of(self, instruction: Instruction) -> str:
        """The line that made an instruction and the lines that called it, without those of libraries; "" if unknown.

        Such as ``models/mlp.py:87 > layers.py:135 > projection.py:79``.
        """
        if match := _LINE.search(instruction.text):
            return f"{_short(match[1])}:{match[2]}"
        match = _FRAME.search(instruction.text)
        if match is None:
            return ""
        frames = list(self._frames(int(match[1])))
        own = [frame for frame in frames if not _LIBRARIES.search(frame[0])] or frames[:1]
        shown: list[tuple[str, str]] = []
        for file, line in own:
            if not shown or shown[-1][0] != file:  # of a file, the innermost line
                shown.append((file, line))
        names = [f"{_short(file)}:{line}" for file, line in reversed(shown[:_CALLERS])]
        return " > ".join([*names[:1], *(name.split("/")[-1] for name in names[1:])])

    def _frames(self, frame: int) -> Iterator[tuple[str, str]]:
        """File and line of a frame and of those that called it, innermost first."""
        for _ in range(100):  # a cycle would be an error of the compiler
            if frame not in self._tables["StackFrames"]:
                return
            location = self._numbers("FileLocations", self._numbers("StackFrames", frame).get("file_location_id", 0))
            file = self._tables["FileNames"].get(location.get("file_name_id", 0), "").strip('"')
            if _COMPILES in file:
                return
            yield file, str(location.get("line", "?"))
            frame = self._caller(frame) - self._none

    def _caller(self, frame: int) -> int:
        return self._numbers("StackFrames", frame).get("parent_frame_id", 0)

    def _numbers(self, table: str, row: int) -> dict[str, int]:
        return {name: int(value) for name, value in _NUMBER.findall(self._tables[table].get(row, ""))}


def _short(file: str) -> str:
    """A path within its package: what follows the last ``sft_jax``; of others, the file and its folder.

    >>> _short("/home/me/sft_jax/sft_jax/models/mlp.py"), _short("/opt/MaxText/layers/attentions.py")
    ('models/mlp.py', 'layers/attentions.py')
    """
    if _PACKAGE in file:
        return file.rpartition(_PACKAGE)[2]
    return "/".join(PurePath(file).parts[-2:])
