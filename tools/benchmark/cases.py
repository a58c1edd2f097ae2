"""The cases of ``bench.py grid``, the most important ones first."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from benchmark.documents import KINDS

MODES = ("lora", "qlora", "full")
EIGHT_BITS = ("int8", "fp8")  # of the large products; all else is bfloat16
PRECISIONS = ("float32", "bfloat16", *EIGHT_BITS)
SHAPES = ("8b", "1b", "0.6b", "1.5b")
# The sides of a comparison, with what each runner is told.
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft_jax": ("sft_jax", {"remat": "auto"}),
    "trl, checkpointing": ("trl", {"checkpointing": True}),
    "sft_jax, recomputing": ("sft_jax", {"remat": "full"}),
    "trl": ("trl", {"checkpointing": False}),
}
# Both defaults; both recompute; neither recomputes where that fits.
RATIOS = (
    ("sft_jax", "trl, checkpointing"),
    ("sft_jax, recomputing", "trl, checkpointing"),
    ("sft_jax", "trl"),
)
_COMPARED = {
    "no": ("sft_jax", "trl, checkpointing"),
    "only": ("sft_jax, recomputing", "trl"),
    "also": tuple(SIDES),
}


@dataclass(frozen=True)
class Load:
    """What a step works on: documents packed in ``sequences`` of ``length`` tokens."""

    documents: str  # of KINDS
    length: int
    sequences: int

    def __str__(self) -> str:
        return f"{self.documents}:{self.length}x{self.sequences}"

    @staticmethod
    def parse(text: str) -> Load:
        """Parses ``short:2048x8``.

        >>> Load.parse("long:8192x2")
        Load(documents='long', length=8192, sequences=2)

        Raises:
            ValueError: another form.
        """
        match = re.fullmatch(rf"({'|'.join(KINDS)}):([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise ValueError(f"{text!r} is not such as short:2048x8")
        return Load(match[1], int(match[2]), int(match[3]))


PUBLISHED_LOAD = Load("long", 4096, 4)  # NVIDIA's: full sequences of 4,096, 32 of them on 8 GPUs
COMPARED_LOAD = Load("short", 2048, 8)  # where TRL runs by default
LOADS = (
    PUBLISHED_LOAD,
    COMPARED_LOAD,
    Load("short", 2048, 1),
    Load("short", 512, 4),
    Load("long", 8192, 2),
    Load("long", 2048, 4),
    Load("short", 8192, 2),
    Load("long", 2048, 16),
    Load("short", 512, 16),
    Load("short", 512, 1),
    Load("long", 8192, 1),
)


@dataclass(frozen=True)
class Case:
    """One run of one side."""

    shape: str
    mode: str
    precision: str
    load: Load
    side: str

    @property
    def pair(self) -> Case:
        """The case without its side: equal for all that are compared."""
        return dataclasses.replace(self, side="")

    @property
    def dtype(self) -> str:
        """Dtype of the model and of all that is not multiplied in eight bits."""
        return "float32" if self.precision == "float32" else "bfloat16"

    def name(self) -> str:
        return f"{self.shape} {self.mode} {self.precision} {self.load}"

    def as_json(self) -> dict[str, Any]:
        return {
            "shape": self.shape, "mode": self.mode, "precision": self.precision, "load": str(self.load),
            "side": self.side,
        }  # fmt: skip

    @staticmethod
    def of_json(found: dict[str, Any]) -> Case:
        return Case(found["shape"], found["mode"], found["precision"], Load.parse(found["load"]), found["side"])


def cases(
    shapes: Sequence[str],
    modes: Sequence[str],
    precisions: Sequence[str],
    loads: Sequence[Load] | None = None,
    compared: Collection[Load] = (COMPARED_LOAD,),
    with_trl: bool = True,
    sparing: str = "also",
) -> list[Case]:
    """Lists the cases: those of the published figures, then the comparisons with TRL, then all others by load.

    Args:
        loads: None for :data:`LOADS`, where ``1.5b`` has only the case of its published figures.
        compared: loads with several sides.
        sparing: the sides of these. ``no``: both libraries with their defaults; ``only``: this library recomputing,
            TRL not; ``also``: both.
    """
    listed = []
    for load in loads or LOADS:
        for shape in shapes:
            for mode in modes:
                if loads is None and shape == "1.5b" and (load, mode) != (PUBLISHED_LOAD, "full"):
                    continue  # only for LLMQ's figures
                for precision in precisions:
                    sides = _COMPARED[sparing] if load in compared and precision not in EIGHT_BITS else ("sft_jax",)
                    listed += [
                        Case(shape, mode, precision, load, side)
                        for side in sides
                        if with_trl or SIDES[side][0] != "trl"
                    ]
    return sorted(listed, key=_rank)


def _rank(case: Case) -> int:
    """0: a published figure stands beside it; 1: the comparisons with TRL that are repeated for each version; 2."""
    if case.load == PUBLISHED_LOAD and case.shape in ("8b", "1.5b") and case.mode != "qlora":
        return 0
    is_repeated = case.shape in ("8b", "1b") and case.mode != "qlora" and case.precision == "bfloat16"
    return 1 if case.load == COMPARED_LOAD and is_repeated else 2
