"""What makes a config fit that does not: changes tried one after the other, each by compiling it.

They come in the order of what they cost: first those that leave the result as it is (rematerialisation, more parts of
the batch, another mesh), then those that round more (a quantised base, weights and moments in fewer bits), then more
chips. A change that does not suffice but takes less memory stays, and the next one is tried on top of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.planning.changes import Changes, changed
from sft_jax.planning.topology import Topology

_DOUBLINGS = 4  # of the number of chips
_PARTS = "training.num_microbatches"


@dataclass(frozen=True)
class Outcome:
    """Whether a step fits, and what it takes of a device."""

    fits: bool
    peak_bytes: int | None  # None where the compiler did not say
    resident_bytes: int  # weights, optimizer state and batch; the least that any step takes


@dataclass(frozen=True)
class Advice:
    """The changes that are needed, on which chips; and all that was tried on the way, in order."""

    changes: Changes | None  # None: nothing that was tried fits
    topology: Topology
    outcome: Outcome
    tried: list[tuple[Changes, Topology, Outcome]]


Compile = Callable[[Config, Topology], Outcome]


def advise(
    config: Config, topology: Topology, num_heads: int, usable_bytes: int, found: Outcome, compile_with: Compile
) -> Advice:
    """Changes with which a step fits that was found not to.

    Args:
        num_heads: that ``mesh.tensor`` has to divide.
        usable_bytes: of a device.
        found: what became of the config as it is.
        compile_with: compiles the step of a config on a topology; raises UserError where ``train`` would refuse it.
    """
    tried: list[tuple[Changes, Topology, Outcome]] = []
    kept: Changes = {}
    best = found

    def attempt(changes: Changes, where: Topology) -> Outcome | None:
        try:
            outcome = compile_with(changed(config, changes), where)
        except UserError:  # these do not go together
            return None
        tried.append((changes, where, outcome))
        return outcome

    for name, rungs in _ladder(config, topology, num_heads):
        if name != "weights" and best.resident_bytes >= usable_bytes:
            # Cannot suffice: what does not depend on activations is too much already.
            kept |= rungs[0] if name == "activations" else {}
            continue
        for rung in rungs:
            changes = kept | rung
            if name == "mesh":  # fewer devices split the rows: more parts
                changes |= {_PARTS: _most_parts(changed(config, changes), topology)}
            outcome = attempt(changes, topology)
            if outcome is None:
                continue
            if outcome.fits:
                changes, outcome = _fewest(config, topology, changes, outcome, attempt)
                return Advice(changes, topology, outcome, tried)
            if _takes_less(outcome, best):
                kept, best = changes, outcome
    where: Topology | None = topology
    for _ in range(_DOUBLINGS):
        where = None if where is None else where.larger()
        if where is None:
            break
        for tensor in _tensor_sizes(config, where, num_heads):
            changes = kept | ({} if tensor == config.mesh.tensor else {"mesh.tensor": tensor})
            changes |= {} if -1 in (config.mesh.data, config.mesh.fsdp) else {"mesh.fsdp": -1}
            changes |= _fitting_parts(config, changes, where)
            outcome = attempt(changes, where)
            if outcome is not None and outcome.fits:
                return Advice(changes, where, outcome, tried)
            if outcome is not None:
                break
    return Advice(None, topology, best, tried)


def _ladder(config: Config, topology: Topology, num_heads: int) -> Iterator[tuple[str, list[Changes]]]:
    """What to try, the cheapest first, and what it is good for; alternatives of a rung come from good to best.

    ``activations`` and ``mesh`` do not help where ``weights`` are too large.
    """
    if config.model.remat not in ("auto", "full"):
        yield "activations", [{"model.remat": "full"}]
    parts = _most_parts(config, topology)
    if parts > config.training.num_microbatches:
        yield "activations", [{_PARTS: parts}]
    for sequence in (2, 4, 8):
        if sequence > config.mesh.sequence and topology.num_devices % sequence == 0:
            yield "mesh", [{"mesh.data": 1, "mesh.fsdp": -1, "mesh.sequence": sequence}]
    if config.mesh.data != 1 and topology.num_devices > 1:
        yield "weights", [{"mesh.data": 1, "mesh.fsdp": -1}]
    if config.lora is not None:
        if config.model.quantization is None and config.model.init == "pretrained":
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


def _fewest(
    config: Config, topology: Topology, fitting: Changes, outcome: Outcome, attempt: Callable[..., Outcome | None]
) -> tuple[Changes, Outcome]:
    """Of changes with which it fits, those that are needed: each is left out once, and fewer parts are tried."""
    *others, _ = fitting  # the last one is needed, or it would have fitted before
    for key in [key for key in others if key != _PARTS and not key.startswith("mesh.")]:
        changes = {other: value for other, value in fitting.items() if other != key}
        found = attempt(changes, topology)
        if found is not None and found.fits:
            fitting, outcome = changes, found
    parts = config.training.num_microbatches * 2
    while parts < fitting.get(_PARTS, 0):
        found = attempt(fitting | {_PARTS: parts}, topology) if config.training.batch_size % parts == 0 else None
        if found is not None and found.fits:
            return fitting | {_PARTS: parts}, found
        parts *= 2
    return fitting, outcome


def _shards(config: Config, topology: Topology) -> int:
    """Over how many devices rows are split."""
    whole = config.mesh.sequence * config.mesh.tensor  # devices that share rows
    return max(1, topology.num_devices // whole) if whole > 0 else 1


def _most_parts(config: Config, topology: Topology) -> int:
    """Parts of a batch when each device computes one row at a time."""
    return max(1, config.training.batch_size // _shards(config, topology))


def _fitting_parts(config: Config, changes: Changes, topology: Topology) -> Changes:
    """As many parts as before, or as many as there are rows for."""
    there = changed(config, changes)
    parts = min(there.training.num_microbatches, _most_parts(there, topology))
    return {} if parts == there.training.num_microbatches else {_PARTS: parts}


def _tensor_sizes(config: Config, topology: Topology, num_heads: int) -> list[int]:
    """Sizes of the tensor axis with which the batch divides over the devices, from the config's on."""
    own = max(1, config.mesh.tensor)
    sizes = [size for size in (1, 2, 4, 8, 16) if size >= own and num_heads % size == 0]
    return [
        size
        for size in sizes
        if topology.num_devices % (whole := size * config.mesh.sequence) == 0
        and config.training.batch_size % (topology.num_devices // whole) == 0
    ]


def _takes_less(one: Outcome, other: Outcome) -> bool:
    if one.peak_bytes is None or other.peak_bytes is None:
        return one.resident_bytes <= other.resident_bytes
    return one.peak_bytes < other.peak_bytes
