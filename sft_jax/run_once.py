"""Programs that run once: on a CPU, compiling them takes longer than running them."""

from __future__ import annotations

from typing import Any

# LLVM's later passes cost more than they save: a draw of seven adapters compiles in a quarter of the time.
_QUICKLY = {"xla_backend_optimization_level": 1}


def compile_quickly(device: Any) -> dict[str, Any]:
    """Returns ``compiler_options`` of ``jax.jit`` for a program that runs once on a device like this one."""
    return dict(_QUICKLY) if device.platform == "cpu" else {}
