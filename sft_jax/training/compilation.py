"""Compiles the train step per sequence length, with the fastest policy that fits on the device, and caches it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sft_jax.config import Config
from sft_jax.distributed.processes import gather
from sft_jax.errors import UserError
from sft_jax.progress import Work
from sft_jax.training.programs import record_programs
from sft_jax.tree import Params
from sft_jax.typing import Batch

CANDIDATES = ("dots", "attention", "full")  # for ``remat: auto``, from the fastest to the least memory
SHARE = 0.92  # fraction of free memory that a step may use
MIN_TOKENS = 4096  # per microbatch and device; fewer make products slow and are tried last

FitOption = tuple[str, int]  # rematerialization policy, number of microbatches


@dataclass(frozen=True)
class Compiled:
    """A compiled program with its settings and statistics."""

    program: Callable[..., Any]
    length: int
    remat: str
    num_microbatches: int
    seconds: float  # for tracing and compiling, including programs that did not fit
    temp_bytes: int | None  # per device, beyond weights, optimizer state and batch


def fit_candidates(remat: str, num_microbatches: int | str, sequences: int, length: int) -> list[FitOption]:
    """Returns pairs of rematerialization policy and number of microbatches, in order of preference.

    The policy that recomputes least comes first. More microbatches come before a policy that recomputes more, as long
    as each microbatch has :data:`MIN_TOKENS` tokens per device.

    Args:
        remat, num_microbatches: as in the config; ``auto`` tries several values.
        sequences: sequences of the global batch per device.
        length: tokens of a sequence per device.

    >>> fit_candidates("auto", "auto", sequences=4, length=2048)
    [('dots', 1), ('dots', 2), ('attention', 1), ('attention', 2), ('full', 1), ('full', 2), ('full', 4)]
    >>> fit_candidates("full", 2, sequences=4, length=2048)
    [('full', 2)]
    """
    policies = CANDIDATES if remat == "auto" else (remat,)
    if num_microbatches != "auto":
        return [(policy, int(num_microbatches)) for policy in policies]
    counts = [n for n in range(1, sequences + 1) if sequences % n == 0]
    large = [n for n in counts if sequences // n * length >= MIN_TOKENS] or [1]
    return [(policy, n) for policy in policies for n in large] + [(policies[-1], n) for n in counts if n not in large]


def fit_options(config: Config, mesh: Mesh) -> list[FitOption]:
    """:func:`fit_candidates` for a config on a mesh."""
    training = config.training
    sequences = training.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    length = config.data.max_length // mesh.shape["sequence"]
    return fit_candidates(config.model.remat, training.num_microbatches, sequences, length)


class Steps:
    """The train step, compiled for each sequence length, all with the settings that fit the longest.

    Args:
        make: returns the jitted step for a rematerialization policy and a number of microbatches.
        ways: pairs of policy and number of microbatches; the first that fits is used.
        device: a device of this process that runs the step.
        on_compile: called with each compiled program.
    """

    def __init__(
        self,
        make: Callable[[str, int], Any],
        ways: Sequence[FitOption],
        device: Any,
        on_compile: Callable[[Compiled], object] = lambda _: None,
    ):
        self._make, self._device, self._on_compile = make, device, on_compile
        self._ways = list(ways)
        self._auto = len({num for _, num in ways}) > 1
        self._programs: dict[int, Callable[..., Any]] = {}

    def prepare(self, state: Any, frozen: Params, batch: Batch, longest: int) -> None:
        """Chooses the settings by compiling for sequences of ``longest`` tokens.

        Raises:
            UserError: no settings fit.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((x.shape[0], longest), x.dtype, sharding=x.sharding), batch
        )
        self._compile(state, frozen, abstract)

    def __call__(self, state: Any, frozen: Params, batch: Batch) -> Any:
        """Runs a step. With ``num_microbatches: auto``, retries with less memory if the device runs out of it.

        Raises:
            UserError: the step does not fit with any of the remaining settings.
        """
        length = batch.inputs.shape[1]
        while True:
            if length not in self._programs:
                self._compile(state, frozen, batch)
            try:
                return self._programs[length](state, frozen, batch)
            except jax.errors.JaxRuntimeError as error:
                lost = any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
                if not _is_out_of_memory(error) or not self._auto or jax.process_count() > 1 or lost:
                    raise
                if len(self._ways) == 1:
                    raise self._too_large(None, None) from error
                (remat, parts), *self._ways = self._ways
                print(
                    f"   memory  the device ran out of memory with remat {remat} and {parts} microbatch(es); "
                    "the step is repeated with less",
                    file=sys.stderr,
                    flush=True,
                )
                self._programs.clear()

    def _compile(self, state: Any, frozen: Params, batch: Batch) -> None:
        start = time.perf_counter()
        free = _min_over_processes(free_bytes(self._device))
        needed = None
        # Bytes times microbatches of each policy: memory falls no faster than 1 / microbatches.
        smallest: dict[str, float] = {}
        for i, (remat, parts) in enumerate(self._ways):
            is_last = i == len(self._ways) - 1
            if free is not None and smallest.get(remat, 0.0) / parts > SHARE * free and not is_last:
                continue
            try:
                with Work("compiling", of=f"the step with remat {remat}, {parts} microbatch(es)"):
                    program = self._make(remat, parts).lower(state, frozen, batch).compile()
            except jax.errors.JaxRuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                continue
            needed = temp_bytes(program)
            if len(self._ways) == 1 or needed is None or free is None or needed <= SHARE * free:
                length = batch.inputs.shape[1]
                # Keep the settings with less memory, in case the device runs out of memory anyway.
                self._ways = self._ways[i:] if self._auto else [(remat, parts)]
                self._programs[length] = program
                record_programs()
                self._on_compile(Compiled(program, length, remat, parts, time.perf_counter() - start, needed))
                return
            smallest[remat] = float(needed) * parts
        raise self._too_large(needed, free)

    def _too_large(self, needed: int | None, free: int | None) -> UserError:
        details = ""
        if needed is not None and free is not None:
            details = f": it needs {needed / 2**30:.2f} GiB, more than {SHARE:.0%} of the {free / 2**30:.2f} GiB free"
        policies = " or ".join(dict.fromkeys(remat for remat, _ in self._ways))
        auto = "" if self._auto else "training.num_microbatches=auto, "
        return UserError(
            f"model.remat: the step does not fit on {self._device.device_kind} with {policies}{details}; use {auto}"
            "a smaller training.batch_size, a smaller data.max_length, mesh.sequence, or model.attention=xla if "
            "another backend holds a mask of T² entries"
        )


def free_bytes(device: Any) -> int | None:
    """Returns the free memory of a device in bytes; None if it is unknown."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    if device.platform == "cpu" and meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        of_container = _free_in_container(Path("/sys/fs/cgroup"))
        return free if of_container is None else min(free, of_container)
    return None


def _free_in_container(group: Path) -> int | None:
    """Returns the memory that the limit of a container (cgroup v2) leaves; None if there is no limit."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    return max(0, int(limit) - int(used)) if limit.isdigit() else None


def temp_bytes(compiled: Any) -> int | None:
    """Returns the bytes per device that a program uses beyond its arguments; None if unknown."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    # The temporary size excludes the memory of custom kernels; the peak, where reported, includes it.
    return max(analysis.temp_size_in_bytes, analysis.peak_memory_in_bytes - analysis.argument_size_in_bytes)


def _is_out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)  # from compilers and devices alike


def _min_over_processes(free: int | None) -> int | None:
    """Returns the minimum over all processes, so that all choose the same settings."""
    values = gather("free memory", "" if free is None else str(free))
    return min((int(value) for value in values if value), default=None)
