"""Counts the collectives of a compiled program and the bytes that each chip sends for them per step.

The counts come from the optimized HLO text. An operation in a loop counts once per iteration, and an operation in a
branch counts as if the branch were taken. :mod:`sft_jax.planning.network` has the formulas for the bytes.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sft_jax.planning.network import KINDS, Hosts, Sent, sent_in

_Computation = dict[str, str]  # instruction name -> the text after "="

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$|^(ENTRY )?%?([\w.\-]+) \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_ROOT = "ROOT"  # key of a computation's root instruction
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')


# The TPU compiler overlaps a collective with matrix products. One fusion starts it; the overlapping fusions and the
# one that waits for it repeat the collective in their text, so only the first is counted.
_DONE, _CONTINUED = "async-collective-done", "async_collective_fusion"


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind."""

    kind: str
    count: float  # per step
    sent: Sent  # per chip and step


def count_collectives(text: str, hosts: Hosts, unknown_trips: float) -> list[Collective]:
    """Returns the collectives of a compiled program by kind, largest number of bytes first.

    Args:
        text: optimized HLO.
        hosts: host of each device; a collective without replica groups spans all devices.
        unknown_trips: iterations of a loop with a data-dependent trip count (the loop over chunks of targets).
    """
    bodies, entry = _computations(text)
    counts: defaultdict[str, float] = defaultdict(float)
    sizes: defaultdict[str, Sent] = defaultdict(Sent)

    def visit(name: str, times: float) -> None:
        for instruction, line in bodies.get(name, {}).items():
            opcode, shape = _opcode(line)
            if opcode is None or opcode.endswith(("-done", "-update")) or instruction.startswith(_DONE):
                continue
            collective = _collective(opcode, shape, line, name, hosts)
            if collective is not None:
                kind, sent = collective
                counts[kind] += times
                sizes[kind] += sent.times(times)
                continue
            trips = 1.0
            if opcode == "while":
                known = _trip_count(line, bodies)
                trips = unknown_trips if known is None else known
            for called in _called(line):
                if not called.startswith(_CONTINUED):
                    visit(called, times * trips)

    assert entry is not None, "a program without an entry computation"
    visit(entry, 1.0)
    collectives = [Collective(kind, counts[kind], sizes[kind]) for kind in counts]
    return sorted(collectives, key=lambda one: -one.sent.bytes)


def _computations(text: str) -> tuple[dict[str, _Computation], str | None]:
    """Returns the instructions of each computation, and the name of the entry computation."""
    bodies: dict[str, _Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if not line.startswith((" ", "}")) and (match := _COMPUTATION.match(line)):
            current = match[2] or match[4]
            bodies[current] = {}
            if line.startswith("ENTRY"):
                entry = current
        elif current is not None and (match := _INSTRUCTION.match(line)):
            bodies[current][_ROOT if line.lstrip().startswith("ROOT") else match[1]] = match[2]
    return bodies, entry


def _opcode(line: str) -> tuple[str | None, str]:
    """Returns the opcode of an instruction and its result shape."""
    depth = at = 0
    while at < len(line):  # tuple shapes contain spaces, and layouts contain parentheses
        if line[at] in "({":
            depth += 1
        elif line[at] in ")}":
            depth -= 1
        elif line[at] == " " and depth == 0:
            break
        at += 1
    match = re.match(r" ([a-z][\w\-]*)\(", line[at:])
    return (match[1] if match else None), line[:at]


def _collective(opcode: str, shape: str, line: str, computation: str, hosts: Hosts) -> tuple[str, Sent] | None:
    kind = next((kind for kind in KINDS if opcode in (kind, f"{kind}-start", f"ragged-{kind}")), None)
    if kind is None:
        return None
    sizes = [_bytes(*array) for array in _ARRAY.findall(shape)]
    if not sizes:
        return None
    groups, whole = _groups(line, len(hosts)), sum(sizes)
    group = max(map(len, groups))
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"  # the TPU compiler writes it as an all-reduce and a slice
        return kind, sent_in(kind, whole, groups, hosts)
    if opcode.endswith("-start") and kind != "all-reduce":  # the shape is a tuple of operands and results
        whole *= group / (group + 1) if kind in ("all-gather", "reduce-scatter") else 1 / 2
    elif kind == "reduce-scatter":
        whole *= group
    return kind, sent_in(kind, whole, groups, hosts)


def _trip_count(line: str, bodies: dict[str, _Computation]) -> float | None:
    """Trip count of a loop: ``known_trip_count``, or from the condition ``counter < constant`` and the increment.

    The counter starts at zero, as in all loops that JAX and XLA make. None where the count depends on data.
    """
    if match := _TRIPS.search(line):
        return float(match[1])
    called = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", line))
    condition, body = bodies.get(called["condition"], {}), bodies.get(called["body"], {})
    compared = re.search(r" compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", condition.get(_ROOT, ""))
    if compared is None:
        return None
    index = re.search(r" get-tuple-element\(.*index=(\d+)", condition.get(compared[1], ""))
    bound = _constant(condition.get(compared[2], ""))
    if index is None or bound is None:
        return None
    results = re.search(r" tuple\((.*?)\)(?:,|$)", body.get(_ROOT, ""))
    if results is None:
        return float(bound)
    names = [name.strip().lstrip("%") for name in re.sub(r"/\*.*?\*/", "", results[1]).split(",")]
    return float(-(-bound // max(1, _increment(names[int(index[1])], int(index[1]), body))))


def _increment(name: str, index: int, body: _Computation) -> int:
    """What an iteration adds to element ``index`` of the loop state; 1 where it is not a sum of constants."""
    line = body.get(name, "")
    if re.search(rf" get-tuple-element\(.*index={index}\b", line):
        return 0
    if match := re.search(r" (?:add|copy)\(%?([\w.\-]+)(?:, %?([\w.\-]+))?\)", line):
        constant = 0 if match[2] is None else _constant(body.get(match[2], ""))
        if constant is not None:
            return _increment(match[1], index, body) + constant
    return 1


def _constant(line: str) -> int | None:
    match = re.search(r" constant\((\d+)\)", line)
    return int(match[1]) if match else None


def _called(line: str) -> Iterator[str]:
    for _, name in _CALLED.findall(line):
        yield name
    for names in _BRANCHES.findall(line):
        yield from (name.strip().lstrip("%") for name in names.split(","))


def _groups(line: str, num_devices: int) -> list[list[int]]:
    """Replica groups of a collective; source-target pairs of a permutation.

    >>> _groups("replica_groups={{0,1},{2,3}}, use_global_device_ids=true", 4)
    [[0, 1], [2, 3]]
    >>> _groups("replica_groups=[2,2]<=[4]", 4)
    [[0, 1], [2, 3]]
    >>> _groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)  # 0 to 3 as 2 × 2, transposed
    [[0, 2], [1, 3]]
    >>> _groups("source_target_pairs={{0,1},{1,0}}", 4)
    [[0, 1], [1, 0]]
    >>> _groups("replica_groups={}", 4)
    [[0, 1, 2, 3]]
    """
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims, order = ([int(one) for one in part.split(",")] if part else [] for part in match.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape).tolist()
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]+\})\}", line):
        return [[int(one) for one in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])]
    return [list(range(num_devices))]


def _bytes(dtype: str, dims: str) -> float:
    """Size of an array in bytes; tokens, which only synchronize, have size 0.

    >>> _bytes("bf16", "4,8"), _bytes("s4", "4,8"), _bytes("token", "")
    (64.0, 16.0, 0.0)
    """
    if dtype == "token":
        return 0.0
    bits = 8 if dtype == "pred" else int(re.sub(r"^[a-z]+", "", dtype).split("e")[0])
    return math.prod(int(size) for size in dims.split(",") if size) * bits / 8
