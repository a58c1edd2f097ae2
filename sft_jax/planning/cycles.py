"""Sums the cycles that the TPU compiler estimates for a program, by kind of instruction.

The compiler writes its estimate (``estimated_cycles``) next to each fusion of the optimized HLO text. The body of a
loop counts as often as the loop turns, a conditional as its largest branch, and a fusion as its own number. Pallas
kernels have no estimate and count as their FLOPs at the peak of the matrix unit. Other operations without an estimate,
above all concatenations, count as their products at peak or as what they read and write at the bandwidth of the HBM,
whichever takes longer. Copies and collectives that overlap with others count nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from sft_jax.planning.chips import Chip
from sft_jax.planning.collectives import kind_of
from sft_jax.planning.hlo import Instruction, Program, bytes_in_memory, num_bytes
from sft_jax.planning.kernel_flops import kernel_flops
from sft_jax.planning.product_flops import PRODUCTS, flops_at_rate, flops_at_rate_of
from sft_jax.planning.source_lines import SourceLines

KINDS = ("products", "attention", "elementwise", "copies", "slices", "collectives")
AT_PEAK = ("products", "attention")  # the kinds that the matrix unit computes
PASSES = ("forward", "recomputed", "backward", "optimizer", "other")

_ESTIMATE = re.compile(r'"estimated_cycles":"?(\d+)')
_NO_ESTIMATE = 2**62  # the compiler writes 2⁶³ − 1 for a fusion that it could not estimate
_NUMBER = re.compile(r"[.\d]+$")
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_NEUTRAL = {"parameter", "bitcast", "tuple", "get-tuple-element", "constant", "convert", "fusion", "broadcast"}
_COPIES = {"copy", "transpose", "reshape"}
_SLICES = {"slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad", "gather", "scatter"}


@dataclass(frozen=True)
class Place:
    """An instruction, and how often it runs in a step.

    Attributes:
        kind: one of :data:`KINDS`.
        operation: the JAX operations that it comes from; of the loop around it where the compiler added it.
        source: the lines that made it, see :meth:`SourceLines.of`.
        times: runs per step.
        cycles: of a run.
        at_peak: cycles of a run at the peak of the matrix unit; 0 for other kinds.
        is_estimated: whether the compiler estimated the cycles; kernels count as such.
    """

    kind: str
    name: str
    shape: str
    operation: str
    source: str
    times: float
    cycles: float
    at_peak: float
    is_estimated: bool = True

    @property
    def total(self) -> float:
        return self.cycles * self.times

    @property
    def part(self) -> str:
        """The pass: one of :data:`PASSES`."""
        return _part(self.operation)


@dataclass
class Estimate:
    """The compiler's estimate of a program on one chip.

    Attributes:
        places: everything that has cycles.
        trips: iterations that were assumed for each loop whose trip count depends on data, by its source line.
        kernels: fraction of the scores that each Pallas kernel computes, by name; 1 for other kernels.
        uncounted: names of the kernels without a known number of FLOPs.
    """

    places: list[Place] = field(default_factory=list)
    trips: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)
    uncounted: list[str] = field(default_factory=list)

    @property
    def cycles(self) -> float:
        return sum(place.total for place in self.places)

    @property
    def unestimated(self) -> dict[str, float]:
        """Cycles of what the compiler did not estimate, by name without its number."""
        totals: defaultdict[str, float] = defaultdict(float)
        for place in self.places:
            if not place.is_estimated:
                totals[_NUMBER.sub("", place.name)] += place.total
        return dict(totals)

    def of_kind(self, kind: str) -> float:
        return sum(place.total for place in self.places if place.kind == kind)

    def at_peak(self, *kinds: str) -> float:
        """Cycles that these kinds would take at the peak of the matrix unit."""
        return sum(place.at_peak * place.times for place in self.places if place.kind in kinds)


def estimate(program: Program, chip: Chip, unknown_trips: Callable[[str], float]) -> Estimate | None:
    """Sums the compiler's estimates in a program's text; None where the compiler wrote none.

    Args:
        chip: a TPU that the program is compiled for.
        unknown_trips: from the source lines of a loop with a data-dependent trip count to its iterations.
    """
    if _ESTIMATE.search(program.text) is None:
        return None
    return _Visit(program, chip, unknown_trips).result


class _Visit:
    """Walks through a program from its entry."""

    def __init__(self, program: Program, chip: Chip, unknown_trips: Callable[[str], float]) -> None:
        self._program, self._lines = program, SourceLines(program.text)
        assert chip.flops_per_cycle is not None, f"{chip.name} is not a TPU"
        self._flops_per_cycle, self._double_rate = chip.flops_per_cycle, chip.double_rate
        self._bytes_per_cycle = chip.hbm_bandwidth * chip.flops_per_cycle / chip.flops
        self._unknown_trips = unknown_trips
        self.result = Estimate()
        self.result.places = list(self._places(program.entry, 1.0, ""))

    def _places(self, computation: str, times: float, within: str) -> Iterator[Place]:
        """Yields what a computation runs ``times`` times; ``within`` is the operation that contains it."""
        for one in self._program[computation].instructions.values():
            match = _OP_NAME.search(one.text)
            operation = match[1] if match else within  # the compiler's own copies have none
            if one.opcode == "while":
                trips = self._program.trip_count(one)
                if trips is None:
                    source = self._lines.of(one)
                    trips = self.result.trips[source or one.name] = self._unknown_trips(source)
                yield from self._places(one.attribute("body") or "", times * trips, operation)
            elif one.opcode == "conditional":
                branches = [list(self._places(called, times, operation)) for called in one.called]
                yield from max(branches, key=lambda places: sum(place.total for place in places), default=[])
            elif one.opcode == "call":
                for called in one.called:
                    yield from self._places(called, times, operation)
            elif (place := self._place(computation, one)) is not None:
                yield replace(place, operation=operation, times=times)

    def _place(self, computation: str, one: Instruction) -> Place | None:
        """Returns a run of an instruction; None if it takes no time."""
        if one.opcode == "custom-call" and one.attribute("custom_call_target") == '"tpu_custom_call"':
            kind, cycles = self._kernel(computation, one)
            return None if kind is None else self._of(kind, one, cycles, cycles)
        match = _ESTIMATE.search(one.text)
        cycles = float(match[1]) if match else 0.0
        is_estimated = 0 < cycles < _NO_ESTIMATE
        if not is_estimated and one.opcode != "fusion" and one.opcode not in _COPIES | _SLICES:
            return None
        kind = _kind(one.opcode) if one.opcode != "fusion" else self._kind_of_fusion(one)
        if kind == "collectives" and not is_estimated:
            return None
        at_peak = self._peak_flops(computation, one) / self._flops_per_cycle if kind == "products" else 0.0
        if not is_estimated:
            cycles = max(at_peak, self._bytes(computation, one) / self._bytes_per_cycle)
        return self._of(kind, one, cycles, at_peak, is_estimated)

    def _of(self, kind: str, one: Instruction, cycles: float, at_peak: float, is_estimated: bool = True) -> Place:
        return Place(kind, one.name, one.shape, "", self._lines.of(one), 1.0, cycles, at_peak, is_estimated)

    def _kernel(self, computation: str, one: Instruction) -> tuple[str | None, float]:
        """Returns the kind and the cycles of a Pallas kernel; None as kind if its FLOPs are unknown."""
        found, name = kernel_flops(self._program[computation], one), _NUMBER.sub("", one.name)
        if found is None:
            self.result.uncounted.append(name)
            return None, 0.0
        self.result.kernels[name] = found.share
        return "attention" if found.is_attention else "products", found.flops / self._flops_per_cycle

    def _bytes(self, computation: str, one: Instruction) -> float:
        """Bytes of the HBM that an instruction writes, and reads: of each operand at most as many as in the result."""
        operands = (self._program[computation].operand(one, index) for index in range(len(one.operands)))
        if one.opcode == "dynamic-update-slice":  # in place: the second operand is read and written
            return 2 * sum(bytes_in_memory(operand.shape) for operand in [*operands][1:2] if operand is not None)
        if updates := self._scattered(computation, one):  # in place: each is read, added to what was there, and written
            return 3 * updates
        result = sum(map(num_bytes, one.arrays))
        read = sum(min(bytes_in_memory(operand.shape), result) for operand in operands if operand is not None)
        return bytes_in_memory(one.shape) + read

    def _scattered(self, computation: str, one: Instruction) -> float:
        """Bytes of the updates of a scatter, also in a fusion; 0 for other instructions."""
        if one.opcode == "scatter":
            updates = self._program[computation].operand(one, 2)
            return 0.0 if updates is None else sum(map(num_bytes, updates.arrays))
        inside = [(called, inner) for called in one.called for inner in self._program[called].instructions.values()]
        return sum(self._scattered(*pair) for pair in inside) if one.opcode == "fusion" else 0.0

    def _peak_flops(self, computation: str, one: Instruction) -> float:
        if one.opcode == "fusion":
            return sum(flops_at_rate(self._program, called, self._double_rate) for called in one.called)
        return flops_at_rate_of(self._program[computation], one, self._double_rate)

    def _kind_of_fusion(self, fusion: Instruction) -> str:
        opcodes = {opcode for called in fusion.called for opcode in self._opcodes(called)} - _NEUTRAL
        if opcodes & set(PRODUCTS):
            return "products"
        if any(kind_of(opcode) for opcode in opcodes):
            return "collectives"
        if opcodes <= _COPIES:
            return "copies"
        return "slices" if opcodes <= _COPIES | _SLICES else "elementwise"

    def _opcodes(self, computation: str) -> Iterator[str]:
        """Opcodes in a fused computation, without those of its index arithmetic."""
        for one in self._program[computation].instructions.values():
            if one.opcode == "fusion":
                for called in one.called:
                    yield from self._opcodes(called)
            elif one.opcode in PRODUCTS or kind_of(one.opcode) or any(set(sizes) - {1} for _, sizes in one.arrays):
                yield one.opcode


def _kind(opcode: str) -> str:
    if opcode in PRODUCTS:
        return "products"
    if kind_of(opcode):
        return "collectives"
    return "copies" if opcode in _COPIES else "slices" if opcode in _SLICES else "elementwise"


def _part(operation: str) -> str:
    """The pass of an operation by its name.

    >>> _part("jit(step)/transpose(jvp())/while/body/rematted_computation/mul"), _part("jit(step)/add"), _part("")
    ('recomputed', 'optimizer', 'other')
    """
    if "rematted_computation" in operation:
        return "recomputed"
    if "transpose(" in operation:
        return "backward"
    if "jvp(" in operation:
        return "forward"
    return "optimizer" if operation else "other"
