"""Turns topology names such as ``v5e:4x4`` and ``h100:8`` into abstract devices for ahead-of-time compilation."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from sft_jax.errors import UserError
from sft_jax.planning.chips import CHIPS, Chip, Gpu

GPU_COMPILER = "pip install 'sft-jax[plan-gpu]'"

# Slice shapes that Google Cloud offers, by number of chips.
_SLICES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {
        4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
        1024: "8x8x16",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """A chip and a shape: dimensions of the slice for TPUs, (hosts, GPUs per host) for GPUs."""

    chip: Chip
    shape: tuple[int, ...]

    def __str__(self) -> str:
        shape = self.shape[1:] if self.chip.platform == "cuda" and self.shape[0] == 1 else self.shape
        return f"{self.chip.name}:{'x'.join(map(str, shape))}"

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape)

    def larger(self) -> Topology | None:
        """Returns the next larger topology on offer, with up to twice the chips; None if there is none."""
        if self.chip.platform == "cuda":
            hosts, gpus = self.shape
            shape = (hosts, min(gpus * 2, self.chip.max_devices)) if gpus < self.chip.max_devices else (hosts * 2, gpus)
            return Topology(self.chip, shape)
        return next(
            (
                Topology(self.chip, _shape(text))
                for number, text in _SLICES[self.chip.dims].items()
                if number > self.num_devices
            ),
            None,
        )


def parse_topology(text: str, asked_by: str = "--topology") -> Topology:
    """Parses ``v5e:4x4``, ``v5p:4x4x4``, ``v5e:16`` (default shape), ``h100:8`` or ``h100:2x8`` (two hosts of 8).

    Args:
        asked_by: the option that names it, for error messages.

    Raises:
        UserError: unknown chip or invalid shape; the message lists the known ones.
    """
    name, _, shape = text.partition(":")
    chip = CHIPS.get(name)
    if chip is None:
        raise UserError(f"{asked_by}: unknown chip in {text!r}; known are {', '.join(CHIPS)}, as in v5e:4x4 or h100:8")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        example = {2: "4x4", 3: "2x2x4"}.get(chip.dims, "8")
        raise UserError(f"{asked_by}: {text!r} has no shape; write {name}:{example}")
    sizes = _shape(shape)
    if chip.platform == "cuda":
        *hosts, gpus = sizes
        if len(hosts) > 1 or gpus > chip.max_devices:
            raise UserError(
                f"{asked_by}: {text!r}: a host has up to {chip.max_devices} GPUs; write {name}:{chip.max_devices}, or "
                f"{name}:2x{chip.max_devices} for two hosts"
            )
        return Topology(chip, (hosts[0] if hosts else 1, gpus))
    slices = _SLICES[chip.dims]
    if len(sizes) == 1 and sizes[0] in slices:
        sizes = _shape(slices[sizes[0]])
    if len(sizes) != chip.dims or math.prod(sizes) > chip.max_devices:
        raise UserError(
            f"{asked_by}: {text!r}: a slice of {name} has {chip.dims} dimensions and up to {chip.max_devices} chips, "
            f"such as {', '.join(slices.values())}"
        )
    return Topology(chip, sizes)


def devices_of(topology: Topology) -> list[Any]:
    """Returns abstract devices to build a mesh from and compile for; they cannot run programs.

    Raises:
        UserError: the compiler for this chip is not installed, or does not support the topology.
    """
    from jax.experimental import topologies

    name = str(topology)
    if topology.chip.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(f"--topology: compiling for {name} needs the TPU compiler: pip install libtpu")
        # Set what libtpu would query from the machine. Without a search for chips, several processes can compile at
        # once, also next to a training run. Its log is of no use to users.
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
        for key, value in {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_STDERR_LOG_LEVEL": "3"}.items():
            os.environ.setdefault(key, value)
        options: dict[str, Any] = {"platform": "tpu", "topology_name": name}
        if topology.num_devices < 4:  # a host usually has four chips
            options["chips_per_host_bounds"] = (*topology.shape, *[1] * (3 - len(topology.shape)))
    else:
        if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (13, 12)):
            raise UserError(f"--topology: compiling for {name} needs the CUDA compiler (no GPU): {GPU_COMPILER}")
        hosts, gpus = topology.shape
        options = {
            "platform": "cuda",
            "topology_name": name,
            "target_config": target_config(topology.chip),
            "topology": f"1x{hosts}x{gpus}",
        }
    from jax.errors import JaxRuntimeError

    try:
        return topologies.get_topology_desc(**options).devices
    except JaxRuntimeError as error:
        raise UserError(
            f"--topology: the compiler does not support {name}: {' '.join(str(error).split())[:200]}"
        ) from error


def usable_bytes(chip: Chip) -> int:
    """Device memory that a JAX process can use: on a GPU 75%, unless ``XLA_CLIENT_MEM_FRACTION`` sets another share."""
    if chip.platform == "tpu":
        return chip.hbm_bytes
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    share = next((os.environ[name] for name in names if name in os.environ), "0.75")
    try:
        return int(float(share) * chip.hbm_bytes)
    except ValueError as error:
        raise UserError(f"{names[1]}: {share!r} is not a number such as 0.9") from error


def target_config(chip: Chip) -> str:
    """Returns XLA's ``stream_executor.GpuTargetConfigProto`` of a GPU in text form."""
    gpu = chip.gpu
    assert isinstance(gpu, Gpu)
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_per_core}
  shared_memory_per_block_optin: {gpu.shared_per_block_optin}
  threads_per_core_limit: {gpu.threads_per_core}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {int(chip.hbm_bandwidth)}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {chip.hbm_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{gpu.description}"
"""


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x"))
