"""Bytes that a chip sends in a collective, in total and to other hosts.

The formulas are those of the best known algorithms on any network. For a group of n chips on h hosts and an array of S
bytes (the unsharded size), a chip sends

                                  in total             of it to other hosts
    all-gather, reduce-scatter    S · (n - 1) / n      S · (h - 1) / n
    all-reduce                    twice that           twice that
    all-to-all                    S · (n - 1) / n      S · (h - 1) / h
    collective-permute            S                    S · c, where c is the fraction of a host's chips that send
                                                       to another host

Between hosts, each host first gathers or reduces locally, and its chips split the transfer evenly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from sft_jax.planning.chips import Chip

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
Hosts = Sequence[int]  # the host of each device, in the program's device order


@dataclass(frozen=True)
class Sent:
    """Bytes that a chip sends."""

    bytes: float = 0.0
    bytes_between_hosts: float = 0.0  # of these

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.bytes + other.bytes, self.bytes_between_hosts + other.bytes_between_hosts)

    def times(self, number: float) -> Sent:
        """Bytes of ``number`` repetitions."""
        return Sent(self.bytes * number, self.bytes_between_hosts * number)

    def seconds(self, chip: Chip) -> float:
        """Lower bound of the time: both networks at their peak, overlapped."""
        within = (self.bytes - self.bytes_between_hosts) / chip.link_bandwidth
        return max(within, self.bytes_between_hosts / (chip.host_bandwidth or math.inf))


def hosts_of(mesh: Mesh) -> Hosts:
    """Host of each device. Hosts of GPUs are joined by a slower network; a TPU slice counts as one host."""
    devices = mesh.devices.flat
    return [0 if device.platform == "tpu" else device.process_index for device in devices]


def groups_along(axes: Sequence[str], mesh: Mesh) -> list[list[int]]:
    """Device groups of a collective over mesh axes."""
    dims = [mesh.axis_names.index(axis) for axis in axes]
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)
    size = math.prod(mesh.devices.shape[i] for i in dims)
    return np.moveaxis(ids, dims, range(-len(dims), 0)).reshape(-1, size).tolist()


def sent_in(kind: str, whole: float, groups: Sequence[Sequence[int]], hosts: Hosts) -> Sent:
    """Bytes that a chip sends in one collective.

    Args:
        kind: one of :data:`KINDS`.
        whole: the unsharded size S in bytes.
        groups: the device groups; source-target pairs for a permutation.
    """
    if kind == "collective-permute":
        crossing, chips = Counter(hosts[a] for a, b in groups if hosts[a] != hosts[b]), Counter(hosts)
        return Sent(whole, whole * max((number / chips[host] for host, number in crossing.items()), default=0.0))
    n, h = max(map(len, groups)), max(len({hosts[device] for device in group}) for group in groups)
    if kind == "all-to-all":
        return Sent(whole * (n - 1) / n, whole * (h - 1) / h)
    return Sent(whole * (n - 1) / n, whole * (h - 1) / n).times(2 if kind == "all-reduce" else 1)
