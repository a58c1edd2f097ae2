"""Measures the run time of a program on a device."""

from __future__ import annotations

import statistics
import time
from typing import Any

IN_A_ROW = 4  # runs dispatched before waiting, so that a fast device does not wait for the host


def median_seconds(program: Any, inputs: tuple[Any, ...], repeats: int = 5) -> float:
    """Median seconds of one run of a jitted or compiled program, after one warm-up run."""
    import jax

    jax.block_until_ready(program(*inputs))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready([program(*inputs) for _ in range(IN_A_ROW)])
        seconds.append((time.perf_counter() - began) / IN_A_ROW)
    return statistics.median(seconds)
