"""Searches for config changes that make a step fit in device memory, by compiling each one.

Changes are tried in order of their cost: first those that keep the result (rematerialization, more microbatches,
another mesh), then those that lower precision (a quantized base, weights and optimizer moments in fewer bits), then
more chips. A change that saves memory but does not suffice is kept, and the next change is tried on top of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.planning.changes import Changes, changed
from sft_jax.planning.topology import Topology

_DOUBLINGS = 4  # how often the number of chips is doubled at most
_MICROBATCHES = "training.num_microbatches"


@dataclass(frozen=True)
class Outcome:
    """Whether a step fits, and the memory that it uses on a device."""

    fits: bool
    peak_bytes: int | None  # None where the compiler did not report it
    resident_bytes: int  # weights, optimizer state and batch: a lower bound of the peak


@dataclass(frozen=True)
class Advice:
    """The changes to make, the topology they need, and all attempts in order."""

    changes: Changes | None  # None: no attempt fits
    topology: Topology
    outcome: Outcome
    tried: list[tuple[Changes, Topology, Outcome]]


Compile = Callable[[Config, Topology], Outcome]


def advise(
    config: Config, topology: Topology, num_heads: int, usable_bytes: int, initial: Outcome, compile_with: Compile
) -> Advice:
    """Returns changes that make the step fit.

    Args:
        num_heads: ``mesh.tensor`` must divide it.
        usable_bytes: memory of a device that the process can use.
        initial: the outcome of the unchanged config, which does not fit.
        compile_with: compiles the step of a config on a topology; raises UserError where ``train`` would refuse it.
    """
    tried: list[tuple[Changes, Topology, Outcome]] = []
    accepted: Changes = {}
    best = initial

    def attempt(changes: Changes, where: Topology) -> Outcome | None:
        try:
            outcome = compile_with(changed(config, changes), where)
        except UserError:  # an invalid combination
            return None
        tried.append((changes, where, outcome))
        return outcome

    for name, alternatives in _candidate_changes(config, topology, num_heads):
        if name != "weights" and best.resident_bytes >= usable_bytes:
            # Cannot suffice: weights, optimizer state and batch alone exceed the memory.
            accepted = accepted | (alternatives[0] if name == "activations" else {})
            continue
        for alternative in alternatives:
            changes = accepted | alternative
            if name == "mesh":  # the batch is split over fewer devices: more microbatches
                changes |= {_MICROBATCHES: _max_microbatches(changed(config, changes), topology)}
            outcome = attempt(changes, topology)
            if outcome is None:
                continue
            if outcome.fits:
                changes, outcome = _minimal(config, topology, changes, outcome, attempt)
                return Advice(changes, topology, outcome, tried)
            if _uses_less(outcome, best):
                accepted, best = changes, outcome
    where: Topology | None = topology
    for _ in range(_DOUBLINGS):
        where = None if where is None else where.larger()
        if where is None:
            break
        for tensor in _tensor_sizes(config, where, num_heads):
            changes = accepted | ({} if tensor == config.mesh.tensor else {"mesh.tensor": tensor})
            changes |= {} if -1 in (config.mesh.data, config.mesh.fsdp) else {"mesh.fsdp": -1}
            changes |= _valid_microbatches(config, changes, where)
            outcome = attempt(changes, where)
            if outcome is not None and outcome.fits:
                return Advice(changes, where, outcome, tried)
            if outcome is not None:
                break
    return Advice(None, topology, best, tried)


def _candidate_changes(config: Config, topology: Topology, num_heads: int) -> Iterator[tuple[str, list[Changes]]]:
    """Yields the changes to try, cheapest first: what each one shrinks, and its alternatives in rising strength.

    ``activations`` and ``mesh`` do not help where ``weights`` are too large.
    """
    if config.model.remat not in ("auto", "full"):
        yield "activations", [{"model.remat": "full"}]
    num_microbatches = _max_microbatches(config, topology)
    if num_microbatches > config.training.num_microbatches:
        yield "activations", [{_MICROBATCHES: num_microbatches}]
    for sequence in (2, 4, 8):
        if sequence > config.mesh.sequence and topology.num_devices % sequence == 0:
            yield "mesh", [{"mesh.data": 1, "mesh.fsdp": -1, "mesh.sequence": sequence}]
    if config.mesh.data != 1 and topology.num_devices > 1:
        yield "weights", [{"mesh.data": 1, "mesh.fsdp": -1}]
    if config.lora is not None:
        if config.model.compute is not None:
            pass  # stores the base in eight bits already
        elif config.model.quantization is None and config.model.init == "pretrained":
            yield "weights", [{"model.quantization": "int8"}, {"model.quantization": "nf4"}]
        elif config.model.quantization == "int8":
            yield "weights", [{"model.quantization": "nf4"}]
    else:
        if config.model.param_dtype == "float32":
            yield "weights", [{"model.param_dtype": "bfloat16"}]
        smaller = {"float32": ["bfloat16", "factored"], "bfloat16": ["factored"]}.get(config.optimizer.moments, [])
        yield "weights", [{"optimizer.moments": moments} for moments in smaller]
    for tensor in (2, 4, 8):
        if tensor > config.mesh.tensor and topology.num_devices % tensor == 0 and num_heads % tensor == 0:
            yield "mesh", [{"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": tensor}]


def _minimal(
    config: Config, topology: Topology, fitting: Changes, outcome: Outcome, attempt: Callable[..., Outcome | None]
) -> tuple[Changes, Outcome]:
    """Drops changes that are not needed: leaves each one out once, then tries fewer microbatches."""
    *others, _ = fitting  # the last one is needed: without it the step did not fit
    for key in [key for key in others if key != _MICROBATCHES and not key.startswith("mesh.")]:
        changes = {other: value for other, value in fitting.items() if other != key}
        smaller = attempt(changes, topology)
        if smaller is not None and smaller.fits:
            fitting, outcome = changes, smaller
    number = config.training.num_microbatches * 2
    while number < fitting.get(_MICROBATCHES, 0):
        changes = fitting | {_MICROBATCHES: number}
        smaller = attempt(changes, topology) if config.training.batch_size % number == 0 else None
        if smaller is not None and smaller.fits:
            return changes, smaller
        number *= 2
    return fitting, outcome


def _shards(config: Config, topology: Topology) -> int:
    """Number of shards of the batch axis."""
    group = config.mesh.sequence * config.mesh.tensor  # devices that hold the same sequences
    return max(1, topology.num_devices // group) if group > 0 else 1


def _max_microbatches(config: Config, topology: Topology) -> int:
    """Number of microbatches with one sequence per batch shard."""
    return max(1, config.training.batch_size // _shards(config, topology))


def _valid_microbatches(config: Config, changes: Changes, topology: Topology) -> Changes:
    """Lowers the number of microbatches to what the batch allows; no change where it is low enough."""
    new = changed(config, changes)
    number = min(new.training.num_microbatches, _max_microbatches(new, topology))
    return {} if number == new.training.num_microbatches else {_MICROBATCHES: number}


def _tensor_sizes(config: Config, topology: Topology, num_heads: int) -> list[int]:
    """Sizes of the tensor axis, from the config's size up, for which the batch divides over the devices."""
    current = max(1, config.mesh.tensor)
    sizes = [size for size in (1, 2, 4, 8, 16) if size >= current and num_heads % size == 0]
    return [
        size
        for size in sizes
        if topology.num_devices % (group := size * config.mesh.sequence) == 0
        and config.training.batch_size % (topology.num_devices // group) == 0
    ]


def _uses_less(one: Outcome, other: Outcome) -> bool:
    if one.peak_bytes is None or other.peak_bytes is None:
        return one.resident_bytes <= other.resident_bytes
    return one.peak_bytes < other.peak_bytes
