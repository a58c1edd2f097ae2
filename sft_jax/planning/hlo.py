"""Parses the optimized HLO text of a compiled program: its computations, and how often its loops turn."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$|^(ENTRY )?%?([\w.\-]+) \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_ON_CHIP = re.compile(r"\b[a-z]+\w*\[[\d,]*\]\{[^}]*S\(1\)[^}]*\}")
_CALLED = re.compile(r"\b(body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')
_COMMENT = re.compile(r"/\*.*?\*/")
# Kernels carry a JSON text over several lines, which belong to the line before.
_BROKEN = re.compile(r"(?<=kernel_metadata=\{)\n.*?\n(?=\})", re.DOTALL)

Array = tuple[str, tuple[int, ...]]  # dtype and sizes


@dataclass(frozen=True)
class Instruction:
    """An instruction of a computation."""

    name: str
    opcode: str
    shape: str  # of the result, with layouts; a tuple has several arrays
    text: str  # everything after "="

    @cached_property
    def arrays(self) -> list[Array]:
        """The arrays of the result."""
        return arrays_in(self.shape)

    @cached_property
    def operands(self) -> list[str]:
        """Names of the operands."""
        inside = _COMMENT.sub("", self.text[self._opening + 1 : self._closing])
        return [one.split()[-1].lstrip("%") for one in _split(inside) if one.strip()]

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls: the body of a loop, all branches, a fused computation."""
        names = [name for _, name in _CALLED.findall(self.text)]
        for branches in _BRANCHES.findall(self.text):
            names += [name.strip().lstrip("%") for name in branches.split(",")]
        return names

    def attribute(self, name: str) -> str | None:
        """The value of ``name={…}`` without braces, or of ``name=word``; None if absent."""
        match = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|%?([^\s,{{}}]+))", self.text[self._closing :])
        return None if match is None else (match[1] if match[1] is not None else match[2])

    @property
    def _opening(self) -> int:
        return len(self.shape) + len(self.opcode) + 1

    @cached_property
    def _closing(self) -> int:
        """Position of the parenthesis behind the operands."""
        depth = 0
        for at in range(self._opening, len(self.text)):
            depth += (self.text[at] == "(") - (self.text[at] == ")")
            if depth == 0:
                return at
        return len(self.text)


@dataclass(frozen=True)
class Computation:
    """The instructions of a computation by name, in the order of the text."""

    instructions: dict[str, Instruction] = field(default_factory=dict)
    roots: list[Instruction] = field(default_factory=list)

    @property
    def root(self) -> Instruction | None:
        return self.roots[0] if self.roots else None

    def operand(self, instruction: Instruction, index: int) -> Instruction | None:
        """The instruction that makes an operand; None if it is not in this computation."""
        names = instruction.operands
        return self.instructions.get(names[index]) if index < len(names) else None


_NOTHING = Computation()


@dataclass(frozen=True)
class Program:
    """A compiled program."""

    text: str
    computations: dict[str, Computation]
    entry: str

    def __getitem__(self, name: str) -> Computation:
        return self.computations.get(name, _NOTHING)

    def trip_count(self, loop: Instruction) -> float | None:
        """How often a loop turns: ``known_trip_count``, or from the condition ``counter < constant`` and the increment.

        The counter starts at zero, as in all loops that JAX and XLA make. None where the count depends on data.
        """
        if match := _TRIPS.search(loop.text):
            return float(match[1])
        condition, body = self[loop.attribute("condition") or ""], self[loop.attribute("body") or ""]
        compared = condition.root
        if compared is None or compared.opcode != "compare" or compared.attribute("direction") != "LT":
            return None
        counter, limit = condition.operand(compared, 0), condition.operand(compared, 1)
        bound = _constant(limit)
        if counter is None or counter.opcode != "get-tuple-element" or bound is None:
            return None
        index = int(counter.attribute("index") or 0)
        if body.root is None or body.root.opcode != "tuple":
            return float(bound)
        return float(-(-bound // max(1, _increment(body.root.operands[index], index, body))))


def parse(text: str) -> Program:
    """Parses optimized HLO text.

    Raises:
        ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in _BROKEN.sub(lambda broken: broken[0].replace("\n", " "), text).splitlines():
        if not line.startswith((" ", "}")) and (match := _COMPUTATION.match(line)):
            name = match[2] or match[4]
            current = computations[name] = Computation()
            if line.startswith("ENTRY"):
                entry = name
        elif current is not None and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match[2], match[3])
            if instruction is not None:
                current.instructions[match[2]] = instruction
                if match[1]:
                    current.roots.append(instruction)
    if entry is None:
        raise ValueError("the text has no entry computation: it is not optimized HLO")
    return Program(text, computations, entry)


def arrays_in(shape: str) -> list[Array]:
    """The arrays of a shape.

    >>> arrays_in("(bf16[4,8]{1,0:T(8,128)(2,1)}, s32[], token[])")
    [('bf16', (4, 8)), ('s32', ()), ('token', ())]
    """
    return [(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in _ARRAY.findall(shape)]


def num_bytes(array: Array) -> float:
    """Size of an array in bytes; tokens, which only synchronize, have size 0.

    >>> num_bytes(("bf16", (4, 8))), num_bytes(("s4", (4, 8))), num_bytes(("f8e4m3fn", (4,))), num_bytes(("token", ()))
    (64.0, 16.0, 4.0, 0.0)
    """
    dtype, sizes = array
    return math.prod(sizes) * bits(dtype) / 8


def bytes_in_memory(shape: str) -> float:
    """Size of the arrays of a shape that are in the memory of a device; others are on the chip, in space ``S(1)``.

    >>> bytes_in_memory("(bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0:T(128)}, s32[])")
    20.0
    """
    arrays = arrays_in(_ON_CHIP.sub("", shape))
    return sum(map(num_bytes, arrays))


def bits(dtype: str) -> int:
    """Bits of an element."""
    if dtype in ("pred", "token"):
        return 8 if dtype == "pred" else 0
    return int(re.sub(r"^[a-z]+", "", dtype).split("e")[0])


def _instruction(name: str, text: str) -> Instruction | None:
    """Parses what comes after "="; None where no instruction does."""
    depth = at = 0
    while at < len(text):  # tuple shapes contain spaces, and layouts contain parentheses
        if text[at] in "({":
            depth += 1
        elif text[at] in ")}":
            depth -= 1
        elif text[at] == " " and depth == 0:
            break
        at += 1
    match = _OPCODE.match(text, at)
    return None if match is None else Instruction(name, match[1], text[:at], text)


def _split(text: str) -> list[str]:
    """Splits at the commas outside of brackets: operands may come with their shapes.

    >>> _split("bf16[2,3]{1,0:T(8,128)} %a, %b")
    ['bf16[2,3]{1,0:T(8,128)} %a', ' %b']
    """
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]


def _increment(name: str, index: int, body: Computation) -> int:
    """What an iteration adds to element ``index`` of the loop state; 1 where it is not a sum of constants."""
    made = body.instructions.get(name)
    if made is None:
        return 1
    if made.opcode == "get-tuple-element" and made.attribute("index") == str(index):
        return 0
    if made.opcode in ("add", "copy"):
        constant = 0 if made.opcode == "copy" else _constant(body.operand(made, 1))
        if constant is not None:
            return _increment(made.operands[0], index, body) + constant
    return 1


def _constant(instruction: Instruction | None) -> int | None:
    match = None if instruction is None else re.search(r" constant\((\d+)\)", instruction.text)
    return int(match[1]) if match else None
