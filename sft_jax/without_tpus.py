"""Leaves the TPU library out where there is no TPU, about which it prints six lines; plan needs only its compiler."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")


def leave_out_tpus() -> None:
    """Name the platforms that jax may use, unless the environment does, if libtpu is installed without a TPU."""
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None or has_tpu():
        return
    has_gpus = any(importlib.util.find_spec(name) is not None for name in _GPU_PLUGINS)
    if not has_gpus:
        os.environ["JAX_PLATFORMS"] = "cpu"


def has_tpu() -> bool:
    """Whether this machine has TPU chips."""
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
