"""Searches for the fastest mesh, number of microbatches and rematerialization policy that fit in memory.

A roofline by formula ranks all combinations. The best ones are compiled and ranked again: by the cycles that the
compiler estimates for the program, or by the network where that takes longer; where the compiler estimates none, by the
roofline with the collectives of the program. The batch size affects training and is kept; where it does not divide over
the devices, it is rounded up to the next multiple.
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

MIN_COMPILED = 4  # candidates to compile, more if none of them fits
MAX_COMPILED = 12  # candidates to compile at most
_AXES = (1, 2, 4, 8)  # sizes of data, sequence and tensor; fsdp takes the rest


@dataclass(frozen=True)
class Candidate:
    """A combination, with its roofline by formula."""

    changes: Changes
    step: AbstractStep
    remat: str
    expected: Roofline

    @property
    def tokens_per_second(self) -> float:
        return _tokens(self.step) / self.expected.seconds


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a compiled step."""

    roofline: Roofline
    compiled_seconds: float | None  # of the compiler's estimate, with what waits for the network; None if it has none

    @property
    def seconds(self) -> float:
        if self.compiled_seconds is None:
            return self.roofline.seconds
        return max(self.compiled_seconds, self.roofline.network_seconds or 0.0)

    @property
    def bound(self) -> str:
        """What takes the time: compute, memory or network, or the compiler's ``cycles``."""
        if self.compiled_seconds is None:
            return self.roofline.bound
        return "network" if self.seconds > self.compiled_seconds else "cycles"

    @property
    def ranked_by(self) -> str:
        """Where ``seconds`` come from: the compiler's ``cycles``, with the network, or the ``roofline``."""
        return "roofline" if self.compiled_seconds is None else "cycles"


@dataclass(frozen=True)
class Choice:
    """A candidate that was compiled."""

    candidate: Candidate
    compiled: Compiled
    predicted: Prediction | None  # None: does not fit

    @property
    def tokens_per_second(self) -> float:
        return 0.0 if self.predicted is None else _tokens(self.candidate.step) / self.predicted.seconds

    @property
    def without_overlap(self) -> float:
        return math.inf if self.predicted is None else self.predicted.roofline.without_overlap


def candidates(
    config: Config,
    build: Callable[[Config], AbstractStep],
    num_devices: int,
    chip: Chip,
    target_share: float,
    document_length: int,
) -> list[Candidate]:
    """Returns all combinations that ``train`` accepts, fastest by formula first."""
    ranked = []
    for mesh in _meshes(num_devices):
        shards = mesh["mesh.data"] * mesh["mesh.fsdp"]
        batch = -(-config.training.batch_size // shards) * shards
        base = mesh | ({} if batch == config.training.batch_size else {"training.batch_size": batch})
        try:
            step = build(changed(config, base | {"training.num_microbatches": 1}))
        except UserError:  # heads or sequence length do not divide over the mesh
            continue
        hosts = hosts_of(step.mesh)
        for number in _divisors(batch // shards):
            for remat in CANDIDATES:
                changes = base | {"training.num_microbatches": number, "model.remat": remat}
                variant = dataclasses.replace(step, config=changed(config, changes), ways=((remat, number),))
                work = variant.work(target_share, document_length)
                sent = expected_sent(variant, remat, work, hosts)
                bounds = roofline(variant, remat, chip, sent, target_share, document_length)
                ranked.append(Candidate(changes, variant, remat, bounds))
    return sorted(ranked, key=lambda one: (-one.tokens_per_second, one.expected.without_overlap))


def choose(
    ranked: list[Candidate],
    usable_bytes: int,
    compile_with: Callable[[Candidate], Compiled],
    predict: Callable[[Candidate, Compiled], Prediction],
) -> list[Choice]:
    """Compiles the best candidates until a few fit; returns all compiled ones, fastest that fits first."""
    choices: list[Choice] = []
    for candidate in ranked:
        fitting = sum(choice.predicted is not None for choice in choices)
        if len(choices) >= (MIN_COMPILED if fitting else MAX_COMPILED):
            break
        step = candidate.step
        if step.resident_bytes() + step.saved_bytes(candidate.remat) > usable_bytes or any(
            choice.predicted is None and _uses_no_less(candidate, choice.candidate) for choice in choices
        ):
            continue
        compiled = compile_with(candidate)
        choices.append(Choice(candidate, compiled, predict(candidate, compiled) if compiled.fits else None))
    return sorted(choices, key=lambda one: (-one.tokens_per_second, one.without_overlap))


def _uses_no_less(one: Candidate, other: Candidate) -> bool:
    """Whether ``one`` needs at least as much memory: weights and tokens per device, and saved activations."""
    ours, theirs = one.step.mesh.shape, other.step.mesh.shape
    return (
        ours["data"] >= theirs["data"]
        and ours["tensor"] <= theirs["tensor"]
        and one.step.local_tokens >= other.step.local_tokens
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
