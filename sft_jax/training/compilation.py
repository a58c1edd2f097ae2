"""Compiling the step: for each sequence length, with the cheapest way to fit the device, once for all starts."""

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
from sft_jax.data.read.folders import cache_folder
from sft_jax.distributed.processes import gather
from sft_jax.errors import UserError
from sft_jax.tree import Params
from sft_jax.typing import Batch

CANDIDATES = ("dots", "attention", "full")  # of ``remat: auto``, from the fastest to the smallest
SHARE = 0.92  # of the memory that is free, which a step may take
LEAST_TOKENS = 4096  # of a microbatch and device, below which products become slow: less is tried last

Way = tuple[str, int]  # rematerialization policy, number of microbatches


@dataclass(frozen=True)
class Compiled:
    """A program and what became of making it."""

    program: Callable[..., Any]
    length: int
    remat: str
    num_microbatches: int
    seconds: float  # tracing and compiling, with what did not fit
    temp_bytes: int | None  # of a device, beyond weights, optimizer state and batch


def ways_to_fit(remat: str, num_microbatches: int | str, sequences: int, length: int) -> list[Way]:
    """Rematerialization policies and numbers of microbatches, the one to prefer first.

    The cheapest policy comes first, with more microbatches before a policy that computes more, as long as a device has
    :data:`LEAST_TOKENS` of each.

    Args:
        remat, num_microbatches: as in the config; ``auto`` leaves it open.
        sequences: of a device, in the global batch.
        length: of a sequence on a device.

    >>> ways_to_fit("auto", "auto", sequences=4, length=2048)
    [('dots', 1), ('dots', 2), ('attention', 1), ('attention', 2), ('full', 1), ('full', 2), ('full', 4)]
    >>> ways_to_fit("full", 2, sequences=4, length=2048)
    [('full', 2)]
    """
    policies = CANDIDATES if remat == "auto" else (remat,)
    if num_microbatches != "auto":
        return [(policy, int(num_microbatches)) for policy in policies]
    parts = [n for n in range(1, sequences + 1) if sequences % n == 0]
    large = [n for n in parts if sequences // n * length >= LEAST_TOKENS] or [1]
    return [(policy, n) for policy in policies for n in large] + [(policies[-1], n) for n in parts if n not in large]


def ways_of(config: Config, mesh: Mesh) -> list[Way]:
    """:func:`ways_to_fit` for a config on a mesh."""
    training = config.training
    sequences = training.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    length = config.data.max_length // mesh.shape["sequence"]
    return ways_to_fit(config.model.remat, training.num_microbatches, sequences, length)


class Steps:
    """The train step, compiled for each sequence length that comes, all in the way that the longest need.

    Args:
        make: the jitted step with a rematerialization policy and a number of microbatches.
        ways: policies and numbers of microbatches; the first that fits is taken.
        device: one of this process that runs it.
        tell: is called with each program that was made.
    """

    def __init__(
        self,
        make: Callable[[str, int], Any],
        ways: Sequence[Way],
        device: Any,
        tell: Callable[[Compiled], object] = lambda _: None,
    ):
        self._make, self._device, self._tell = make, device, tell
        self._ways = list(ways)
        self._auto = len({parts for _, parts in ways}) > 1
        self._programs: dict[int, Callable[..., Any]] = {}

    def prepare(self, state: Any, frozen: Params, batch: Batch, longest: int) -> None:
        """Choose the way, by compiling for sequences of ``longest`` tokens.

        Raises:
            UserError: none fits.
        """
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0], longest), x.dtype, sharding=x.sharding), batch)
        self._compile(state, frozen, like)

    def __call__(self, state: Any, frozen: Params, batch: Batch) -> Any:
        """A step. With ``num_microbatches: auto``, one that runs out of memory is done again in smaller parts.

        Raises:
            UserError: it does not fit in any way that is left.
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
                    f"   memory  the device ran out of it with remat {remat} and {parts} microbatch(es); the step is "
                    "repeated in a smaller way",
                    file=sys.stderr,
                    flush=True,
                )
                self._programs.clear()

    def _compile(self, state: Any, frozen: Params, batch: Batch) -> None:
        began = time.perf_counter()
        free = _least(free_bytes(self._device))
        needed = None
        smallest: dict[str, float] = {}  # bytes times microbatches, by policy: what is held of one falls no faster
        for i, (remat, parts) in enumerate(self._ways):
            is_last = i == len(self._ways) - 1
            if free is not None and smallest.get(remat, 0.0) / parts > SHARE * free and not is_last:
                continue
            try:
                program = self._make(remat, parts).lower(state, frozen, batch).compile()
            except jax.errors.JaxRuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                continue
            needed = temp_bytes(program)
            if len(self._ways) == 1 or needed is None or free is None or needed <= SHARE * free:
                length = batch.inputs.shape[1]
                # What is smaller is kept for a device that runs out of memory all the same.
                self._ways = self._ways[i:] if self._auto else [(remat, parts)]
                self._programs[length] = program
                self._tell(Compiled(program, length, remat, parts, time.perf_counter() - began, needed))
                return
            smallest[remat] = float(needed) * parts
        raise self._too_large(needed, free)

    def _too_large(self, needed: int | None, free: int | None) -> UserError:
        wants = ""
        if needed is not None and free is not None:
            wants = f": it needs {needed / 2**30:.2f} GiB, {SHARE:.0%} of the {free / 2**30:.2f} GiB free may be taken"
        policies = " or ".join(dict.fromkeys(remat for remat, _ in self._ways))
        more = "" if self._auto else "training.num_microbatches=auto, "
        return UserError(
            f"model.remat: the step does not fit on {self._device.device_kind} with {policies}{wants}; use {more}"
            "a smaller training.batch_size, a smaller data.max_length, mesh.sequence, or model.attention=xla where "
            "another backend holds a mask of T² entries"
        )


def keep_programs(device: Any) -> None:
    """Keep compiled programs on disk, beside the tokens, so that the next start does not wait for the compiler.

    Not on a CPU, for which compiling takes seconds and programs are bound to the machine; nor where the user has named
    a place of their own (``JAX_COMPILATION_CACHE_DIR``).
    """
    named = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if device.platform != "cpu" and named is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))


def free_bytes(device: Any) -> int | None:
    """Memory of a device that nothing holds yet; None where it does not say."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    if device.platform == "cpu" and meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return None


def temp_bytes(compiled: Any) -> int | None:
    """Memory of a device that a program takes beyond its arguments; None where the compiler does not say."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    # The temporary size leaves out what kernels written by hand use; the peak, where there is one, does not.
    return max(analysis.temp_size_in_bytes, analysis.peak_memory_in_bytes - analysis.argument_size_in_bytes)


def _is_out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)  # the word of compilers and devices alike


def _least(free: int | None) -> int | None:
    """Over all processes, so that they choose alike."""
    said = gather("free memory", "" if free is None else str(free))
    return min((int(one) for one in said if one), default=None)
