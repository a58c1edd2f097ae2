"""Mesh, rows at a time and rematerialisation with the best predicted speed that fits.

Every combination has a roofline by formula; the best ones are compiled, and of those that fit the fastest wins, with
its collectives counted instead of estimated. The batch size is part of what is learnt and stays, unless it does not
divide over the devices: then the next multiple is taken.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.planning.changes import Changes, changed
from sft_jax.planning.chips import Chip
from sft_jax.planning.network import hosts_of
from sft_jax.planning.roofline import Roofline, expected_sent, roofline
from sft_jax.planning.step import AbstractStep, Compiled
from sft_jax.training.compilation import CANDIDATES

COMPILED = 4  # candidates that are compiled, at least until one fits
MOST = 12  # compiled at all
_AXES = (1, 2, 4, 8)  # sizes of data, sequence and tensor; fsdp takes the rest


@dataclass(frozen=True)
class Candidate:
    """A combination, and how fast it would be by formula."""

    changes: Changes
    step: AbstractStep
    remat: str
    expected: Roofline

    @property
    def tokens_per_second(self) -> float:
        return _tokens(self.step) / self.expected.seconds


@dataclass(frozen=True)
class Choice:
    """A candidate that was compiled."""

    candidate: Candidate
    compiled: Compiled
    predicted: Roofline | None  # None: does not fit

    @property
    def tokens_per_second(self) -> float:
        return 0.0 if self.predicted is None else _tokens(self.candidate.step) / self.predicted.seconds


def candidates(
    config: Config,
    build: Callable[[Config], AbstractStep],
    num_devices: int,
    chip: Chip,
    target_share: float,
    document_length: int,
) -> list[Candidate]:
    """All combinations that ``train`` accepts, the fastest by formula first."""
    found = []
    for mesh in _meshes(num_devices):
        shards = mesh["mesh.data"] * mesh["mesh.fsdp"]
        batch = -(-config.training.batch_size // shards) * shards
        base = mesh | ({} if batch == config.training.batch_size else {"training.batch_size": batch})
        try:
            step = build(changed(config, base | {"training.num_microbatches": 1}))
        except UserError:  # heads or slots that do not divide
            continue
        hosts = hosts_of(step.mesh)
        for parts in _divisors(batch // shards):
            for remat in CANDIDATES:
                changes = base | {"training.num_microbatches": parts, "model.remat": remat}
                there = dataclasses.replace(step, config=changed(config, changes), ways=((remat, parts),))
                work = there.work(target_share, document_length)
                sent = expected_sent(there, remat, work, hosts)
                bounds = roofline(there, remat, chip, sent, target_share, document_length)
                found.append(Candidate(changes, there, remat, bounds))
    return sorted(found, key=lambda one: (-one.tokens_per_second, one.expected.in_turn))


def choose(
    ranked: list[Candidate],
    usable_bytes: int,
    compile_with: Callable[[Candidate], Compiled],
    predict: Callable[[Candidate, Compiled], Roofline],
) -> list[Choice]:
    """Compile from the top until a few fit; what was compiled, the fastest that fits first."""
    choices: list[Choice] = []
    for candidate in ranked:
        fitting = sum(choice.predicted is not None for choice in choices)
        if len(choices) >= (COMPILED if fitting else MOST):
            break
        step = candidate.step
        if step.resident_bytes() + step.kept_bytes(candidate.remat) > usable_bytes or any(
            choice.predicted is None and _takes_no_less(candidate, choice.candidate) for choice in choices
        ):
            continue
        compiled = compile_with(candidate)
        choices.append(Choice(candidate, compiled, predict(candidate, compiled) if compiled.fits else None))
    return sorted(
        choices, key=lambda one: (-one.tokens_per_second, one.predicted.in_turn if one.predicted else math.inf)
    )


def _takes_no_less(one: Candidate, other: Candidate) -> bool:
    """Whether a device holds as much of the weights, of as many rows, and keeps as much for the backward pass."""
    ours, theirs = one.step.mesh.shape, other.step.mesh.shape
    return (
        ours["data"] >= theirs["data"]
        and ours["tensor"] <= theirs["tensor"]
        and one.step.slots >= other.step.slots
        and CANDIDATES.index(one.remat) <= CANDIDATES.index(other.remat)
    )


def _meshes(num_devices: int) -> Iterator[Changes]:
    for data, sequence, tensor in itertools.product(_AXES, repeat=3):
        fsdp, rest = divmod(num_devices, data * sequence * tensor)
        if fsdp and not rest:
            yield {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.sequence": sequence, "mesh.tensor": tensor}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _tokens(step: AbstractStep) -> float:
    return step.config.training.batch_size * step.config.data.max_length
