"""What a chip sends in a collective, in all and to other hosts.

It is what the best known algorithms need on any network. Of a group of n chips on h hosts and an array of S bytes (the
whole one, where chips hold parts), a chip sends

                                  in all               of it to other hosts
    all-gather, reduce-scatter    S · (n - 1) / n      S · (h - 1) / n
    all-reduce                    twice that           twice that
    all-to-all                    S · (n - 1) / n      S · (h - 1) / h
    collective-permute            S                    S · c, the share of a host's chips that send to another one

To other hosts, gathering and adding up first happen within a host, and the chips of a host share what it sends.
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
Hosts = Sequence[int]  # the host of each device of a program, in its order


@dataclass(frozen=True)
class Sent:
    """Bytes that a chip sends."""

    bytes: float = 0.0
    bytes_between_hosts: float = 0.0  # of these

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.bytes + other.bytes, self.bytes_between_hosts + other.bytes_between_hosts)

    def times(self, number: float) -> Sent:
        """As often as this."""
        return Sent(self.bytes * number, self.bytes_between_hosts * number)

    def seconds(self, chip: Chip) -> float:
        """No less than it takes: both networks at the peak, side by side."""
        within = (self.bytes - self.bytes_between_hosts) / chip.link_bandwidth
        return max(within, self.bytes_between_hosts / (chip.host_bandwidth or math.inf))


def hosts_of(mesh: Mesh) -> Hosts:
    """The hosts of its devices, between which a slower network lies; a slice of TPUs is one network."""
    devices = mesh.devices.flat
    return [0 if device.platform == "tpu" else device.process_index for device in devices]


def groups_along(axes: Sequence[str], mesh: Mesh) -> list[list[int]]:
    """The devices that meet in a collective along axes of a mesh."""
    at = [mesh.axis_names.index(axis) for axis in axes]
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    size = math.prod(mesh.devices.shape[i] for i in at)
    return np.moveaxis(places, at, range(-len(at), 0)).reshape(-1, size).tolist()


def sent_in(kind: str, whole: float, groups: Sequence[Sequence[int]], hosts: Hosts) -> Sent:
    """By a chip in a collective.

    Args:
        kind: of :data:`KINDS`.
        whole: S above, bytes.
        groups: the devices that meet; of a permutation, from where to where.
    """
    if kind == "collective-permute":
        crossing, chips = Counter(hosts[a] for a, b in groups if hosts[a] != hosts[b]), Counter(hosts)
        return Sent(whole, whole * max((number / chips[host] for host, number in crossing.items()), default=0.0))
    n, h = max(map(len, groups)), max(len({hosts[device] for device in group}) for group in groups)
    if kind == "all-to-all":
        return Sent(whole * (n - 1) / n, whole * (h - 1) / h)
    return Sent(whole * (n - 1) / n, whole * (h - 1) / n).times(2 if kind == "all-reduce" else 1)
