"""Compiling the step: with the cheapest rematerialisation that fits, and only once for all starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from sft_jax.errors import UserError

CANDIDATES = ("dots", "attention", "full")  # of ``remat: auto``, from the fastest to the smallest
_SHARE = 0.92  # of the memory that is free, which a step may take


@dataclass(frozen=True)
class CompiledStep:
    """A step ready to be called."""

    call: Callable[..., Any]
    remat: str
    seconds: float  # tracing and compiling, all candidates together
    temp_bytes: int | None  # of a device, beyond weights, optimizer state and batch


def compile_step(make: Callable[[str], Any], arguments: tuple[Any, ...], remat: str, device: Any) -> CompiledStep:
    """Compile ``make(policy)`` for ``arguments``; ``auto`` takes the first policy whose memory is free on the device.

    Args:
        make: the jitted step with a rematerialisation policy.
        remat: a policy, or ``auto``.
        device: any one that runs it.

    Raises:
        UserError: no policy fits.
    """
    began = time.perf_counter()
    free = free_bytes(device)
    candidates = CANDIDATES if remat == "auto" else (remat,)
    needed = None
    for policy in candidates:
        try:
            compiled = make(policy).lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):  # the compiler's word for a program that does not fit
                raise
            continue
        needed = _temp_bytes(compiled)
        if remat != "auto" or needed is None or free is None or needed <= _SHARE * free:
            return CompiledStep(compiled, policy, time.perf_counter() - began, needed)
    wants = "" if needed is None else f": it needs {needed / 2**30:.1f} GiB, {(free or 0) / 2**30:.1f} are free"
    raise UserError(
        f"model.remat: the step does not fit on {device.device_kind} with {' or '.join(candidates)}{wants}; use a "
        "smaller training.batch_size, more training.gradient_accumulation_steps or a smaller data.max_length"
    )


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


def _temp_bytes(compiled: Any) -> int | None:
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    # The temporary size leaves out what kernels written by hand use; the peak, where there is one, does not.
    return max(analysis.temp_size_in_bytes, analysis.peak_memory_in_bytes - analysis.argument_size_in_bytes)
