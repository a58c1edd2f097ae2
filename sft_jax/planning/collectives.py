"""Counts the collectives of a compiled program and the bytes that each chip sends for them per step.

The counts come from the optimized HLO text. An operation in a loop counts once per iteration, and an operation in a
branch counts as if the branch were taken. :mod:`sft_jax.planning.network` has the formulas for the bytes.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from sft_jax.planning.hlo import Instruction, Program, num_bytes
from sft_jax.planning.network import KINDS, Hosts, Sent, sent_in

# The TPU compiler overlaps a collective with matrix products. One fusion starts it; the overlapping fusions and the
# one that waits for it repeat the collective in their text, so only the first is counted.
_DONE, _CONTINUED = "async-collective-done", "async_collective_fusion"
_FUSED_SCATTER = "all-reduce-scatter"  # a fusion that overlaps nothing: an all-reduce and a slice


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind."""

    kind: str
    count: float  # per step
    sent: Sent  # per chip and step
    alone: Sent  # of it, during which a chip does nothing else


def count_collectives(program: Program, hosts: Hosts, unknown_trips: float) -> list[Collective]:
    """Returns the collectives of a compiled program by kind, largest number of bytes first.

    Args:
        hosts: host of each device; a collective without replica groups spans all devices.
        unknown_trips: iterations of a loop with a data-dependent trip count (the loop over chunks of targets).
    """
    counts: defaultdict[str, float] = defaultdict(float)
    sizes: defaultdict[str, Sent] = defaultdict(Sent)
    alone: defaultdict[str, Sent] = defaultdict(Sent)

    def visit(name: str, times: float, overlapped: bool = False) -> None:
        for one in program[name].instructions.values():
            if one.opcode.endswith(("-done", "-update")) or one.name.startswith(_DONE):
                continue
            collective = _collective(one, name, hosts)
            if collective is not None:
                kind, sent = collective
                counts[kind] += times
                sizes[kind] += sent.times(times)
                if not overlapped and not one.opcode.endswith("-start"):
                    alone[kind] += sent.times(times)
                continue
            trips = 1.0
            if one.opcode == "while":
                known = program.trip_count(one)
                trips = unknown_trips if known is None else known
            for called in one.called:
                if not called.startswith(_CONTINUED):
                    overlaps = one.opcode in ("fusion", "async-start") and _FUSED_SCATTER not in called
                    visit(called, times * trips, overlapped or overlaps)

    visit(program.entry, 1.0)
    collectives = [Collective(kind, counts[kind], sizes[kind], alone[kind]) for kind in counts]
    return sorted(collectives, key=lambda one: -one.sent.bytes)


def kind_of(opcode: str) -> str | None:
    """The kind of a collective by its opcode, where it starts; None for other instructions."""
    return next((kind for kind in KINDS if opcode in (kind, f"{kind}-start", f"ragged-{kind}")), None)


def _collective(one: Instruction, computation: str, hosts: Hosts) -> tuple[str, Sent] | None:
    kind = kind_of(one.opcode)
    if kind is None or not one.arrays:
        return None
    groups, whole = _groups(one.text, len(hosts)), sum(map(num_bytes, one.arrays))
    group = max(map(len, groups))
    if kind == "all-reduce" and _FUSED_SCATTER in computation:
        kind = "reduce-scatter"  # the TPU compiler writes it as an all-reduce and a slice
        return kind, sent_in(kind, whole, groups, hosts)
    if one.opcode.endswith("-start") and kind != "all-reduce":  # the shape is a tuple of operands and results
        whole *= group / (group + 1) if kind in ("all-gather", "reduce-scatter") else 1 / 2
    elif kind == "reduce-scatter":
        whole *= group
    return kind, sent_in(kind, whole, groups, hosts)


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
