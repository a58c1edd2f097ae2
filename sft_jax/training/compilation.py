"""Compiling the step: for each row length, with the cheapest rematerialisation that fits, once for all starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from sft_jax.data.tokenise import cache_folder
from sft_jax.errors import UserError
from sft_jax.processes import gather
from sft_jax.tree import Params
from sft_jax.typing import Batch

CANDIDATES = ("dots", "attention", "full")  # of ``remat: auto``, from the fastest to the smallest
SHARE = 0.92  # of the memory that is free, which a step may take


@dataclass(frozen=True)
class Compiled:
    """A program and what became of making it."""

    program: Callable[..., Any]
    row_length: int
    remat: str
    seconds: float  # tracing and compiling, with the policies that did not fit
    temp_bytes: int | None  # of a device, beyond weights, optimizer state and batch


class Steps:
    """The train step, compiled for each row length that comes, all with the policy that the longest rows need.

    Args:
        make: the jitted step with a rematerialisation policy.
        remat: a policy, or ``auto`` for the first of :data:`CANDIDATES` whose memory is free.
        device: one of this process that runs it.
        tell: is called with each program that was made.
    """

    def __init__(
        self, make: Callable[[str], Any], remat: str, device: Any, tell: Callable[[Compiled], object] = lambda _: None
    ):
        self._make, self._device, self._tell = make, device, tell
        self._candidates = CANDIDATES if remat == "auto" else (remat,)
        self._programs: dict[int, Callable[..., Any]] = {}

    def prepare(self, state: Any, frozen: Params, batch: Batch, longest: int) -> None:
        """Choose the policy, by compiling for rows of ``longest`` slots.

        Raises:
            UserError: no policy fits.
        """
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0], longest), x.dtype, sharding=x.sharding), batch)
        self._compile(state, frozen, like)

    def __call__(self, state: Any, frozen: Params, batch: Batch) -> Any:
        """A step."""
        length = batch.inputs.shape[1]
        if length not in self._programs:
            self._compile(state, frozen, batch)
        return self._programs[length](state, frozen, batch)

    def _compile(self, state: Any, frozen: Params, batch: Batch) -> None:
        began = time.perf_counter()
        free = _least(free_bytes(self._device))
        needed = None
        for policy in self._candidates:
            try:
                program = self._make(policy).lower(state, frozen, batch).compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):  # the compiler's word for a program that does not fit
                    raise
                continue
            needed = temp_bytes(program)
            if len(self._candidates) == 1 or needed is None or free is None or needed <= SHARE * free:
                length = batch.inputs.shape[1]
                self._candidates = (policy,)
                self._programs[length] = program
                self._tell(Compiled(program, length, policy, time.perf_counter() - began, needed))
                return
        wants = ""
        if needed is not None and free is not None:
            wants = f": it needs {needed / 2**30:.2f} GiB, {SHARE:.0%} of the {free / 2**30:.2f} GiB free may be taken"
        raise UserError(
            f"model.remat: the step does not fit on {self._device.device_kind} with {' or '.join(self._candidates)}"
            f"{wants}; use a smaller training.batch_size, more training.num_microbatches, a smaller "
            "data.max_length, mesh.sequence, or model.attention=xla where another kernel holds a mask of T² entries"
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


def _least(free: int | None) -> int | None:
    """Over all processes, so that they choose alike."""
    said = gather("free memory", "" if free is None else str(free))
    return min((int(one) for one in said if one), default=None)


def temp_bytes(compiled: Any) -> int | None:
    """Memory of a device that a program takes beyond its arguments; None where the compiler does not say."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    # The temporary size leaves out what kernels written by hand use; the peak, where there is one, does not.
    return max(analysis.temp_size_in_bytes, analysis.peak_memory_in_bytes - analysis.argument_size_in_bytes)
