"""Published peak rates and memory sizes of the chips that ``plan`` can compile for."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A chip. Rates are theoretical peaks from ``source``; ``hbm_bytes`` is from the compiler or driver."""

    name: str
    platform: str  # JAX platform: tpu | cuda
    flops: float  # dense bfloat16 FLOP/s
    hbm_bytes: int  # TPU: available to programs; GPU: total
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s that a chip sends within its slice or host, sum over its links
    host_bandwidth: float | None  # bytes/s to GPUs of other hosts; None for TPUs, whose slice is one network
    source: str
    dims: int = 0  # dimensions of a TPU slice
    flops_per_cycle: int | None = None  # bfloat16 FLOP of a TPU's matrix units in a cycle
    double_rate: tuple[str, ...] = ()  # dtypes in HLO text that a TPU multiplies at twice the rate of bfloat16
    max_devices: int = 0  # chips of a TPU slice, or GPUs of a host
    gpu: Gpu | None = None

    @property
    def clock(self) -> float | None:
        """Cycles per second of a TPU at which its matrix units reach ``flops``; None if unknown."""
        return None if self.flops_per_cycle is None else self.flops / self.flops_per_cycle


@dataclass(frozen=True)
class Gpu:
    """Device properties that XLA's GPU compiler needs."""

    description: str
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    l2_bytes: int
    shared_per_core: int  # bytes
    shared_per_block_optin: int  # bytes
    fpus_per_core: int = 128
    threads_per_core: int = 2048


_CLOUD = "cloud.google.com/tpu/docs"
_HOPPER = {"shared_per_core": 233_472, "shared_per_block_optin": 232_448}
_AMPERE = {"shared_per_core": 167_936, "shared_per_block_optin": 166_912, "fpus_per_core": 64}
_ADA = {"shared_per_core": 102_400, "shared_per_block_optin": 101_376, "threads_per_core": 1536}  # and small Ampere

# HBM of a TPU is the available size in its compiler's out-of-memory message; of a GPU it is the total that CUDA
# reports, of which JAX takes a fraction. v4 is missing: its compiler targets single cores, but JAX exposes both cores
# of a chip as one device.
# Link bandwidth counts one direction. Google counts both directions since 2024 (v5e: 400 GB/s) and one before
# (1,600 Gbit/s); NVIDIA counts both. GPU rates are with float32 accumulation, half of the float16 rate on GeForce.
# The matrix units of a TPU are those of its documentation and of jax._src.pallas.mosaic.tpu_info: four of 128 × 128 for
# each TensorCore of v5e (one) and v5p (two), two of 256 × 256 on v6e. A cell multiplies and adds once per cycle, on v6e
# twice: its compiler estimates 370,000 FLOP per cycle for a large product. With the published rates these are clocks of
# 1.50, 1.75 and 1.75 GHz.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v5e", "tpu", 197e12, int(15.75 * GIB), 819e9, 200e9, None,
            f"{_CLOUD}/v5e: 197 TFLOPs, 16 GB at 819 GBps, interconnect 1,600 Gbps", dims=2, max_devices=256,
            flops_per_cycle=4 * 128 * 128 * 2, double_rate=("s8", "u8"),
        ),
        Chip(
            "v5p", "tpu", 459e12, int(95.73 * GIB), 2.765e12, 600e9, None,
            f"{_CLOUD}/v5p: 459 TFLOPs, 95 GB at 2,765 GBps, interconnect 4,800 Gbps", dims=3, max_devices=6144,
            flops_per_cycle=2 * 4 * 128 * 128 * 2, double_rate=("s8", "u8"),
        ),
        Chip(
            "v6e", "tpu", 918e12, int(31.24 * GIB), 1.638e12, 400e9, None,
            f"{_CLOUD}/v6e: 918 TFLOPs, 32 GB at 1,638 GBps, interconnect 800 GBps both ways", dims=2, max_devices=256,
            flops_per_cycle=2 * 256 * 256 * 2 * 2, double_rate=("s8", "u8"),
        ),
        Chip(
            "rtx-3090", "cuda", 71e12, int(23.6 * GIB), 936e9, 32e9, 0.6e9,
            "NVIDIA GA102 whitepaper: 71 TFLOPS, 24 GB at 936 GB/s, PCIe 4.0 x16; assumed 5 Gb/s to other hosts",
            max_devices=8, gpu=Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 1.695, 6 * 2**20, **_ADA),
        ),
        Chip(
            "rtx-4090", "cuda", 165e12, int(23.6 * GIB), 1.008e12, 32e9, 0.6e9,
            "NVIDIA Ada whitepaper: 165 TFLOPS, 24 GB at 1,008 GB/s, PCIe 4.0 x16; assumed 5 Gb/s to other hosts",
            max_devices=8, gpu=Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52, 72 * 2**20, **_ADA),
        ),
        Chip(
            "l4", "cuda", 121e12, int(22.0 * GIB), 300e9, 32e9, 1.5e9,
            "NVIDIA L4 datasheet: 242 TFLOPS sparse, 24 GB at 300 GB/s, PCIe 4.0 x16; AWS g6: 100 Gb/s for 8",
            max_devices=8, gpu=Gpu("NVIDIA L4", (8, 9), 58, 2.04, 48 * 2**20, **_ADA),
        ),
        Chip(
            "l40s", "cuda", 362e12, int(44.4 * GIB), 864e9, 32e9, 6.2e9,
            "NVIDIA L40S datasheet: 362 TFLOPS dense, 48 GB at 864 GB/s, PCIe 4.0 x16; AWS g6e: 400 Gb/s for 8",
            max_devices=8, gpu=Gpu("NVIDIA L40S", (8, 9), 142, 2.52, 96 * 2**20, **_ADA),
        ),
        Chip(
            "a100-40g", "cuda", 312e12, int(39.4 * GIB), 1.555e12, 300e9, 25e9,
            "NVIDIA A100 datasheet: 312 TFLOPS, 40 GB at 1,555 GB/s, NVLink 600 GB/s both ways; DGX A100: 8 × 200 Gb/s",
            max_devices=8, gpu=Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41, 40 * 2**20, **_AMPERE),
        ),
        Chip(
            "a100-80g", "cuda", 312e12, int(79.1 * GIB), 2.039e12, 300e9, 25e9,
            "NVIDIA A100 datasheet: 312 TFLOPS, 80 GB at 2,039 GB/s, NVLink 600 GB/s both ways; DGX A100: 8 × 200 Gb/s",
            max_devices=8, gpu=Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 40 * 2**20, **_AMPERE),
        ),
        Chip(
            "h100", "cuda", 989e12, int(79.1 * GIB), 3.35e12, 450e9, 50e9,
            "NVIDIA H100 SXM datasheet: 989 TFLOPS dense, 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways; "
            "DGX H100: 8 × 400 Gb/s",
            max_devices=8, gpu=Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 50 * 2**20, **_HOPPER),
        ),
        Chip(
            "h200", "cuda", 989e12, int(139.8 * GIB), 4.8e12, 450e9, 50e9,
            "NVIDIA H200 SXM datasheet: 989 TFLOPS dense, 141 GB at 4.8 TB/s, NVLink 900 GB/s both ways; "
            "DGX H200: 8 × 400 Gb/s",
            max_devices=8, gpu=Gpu("NVIDIA H200", (9, 0), 132, 1.98, 50 * 2**20, **_HOPPER),
        ),
        Chip(
            "b200", "cuda", 2.25e15, int(178.4 * GIB), 8.0e12, 900e9, 50e9,
            "NVIDIA DGX B200 datasheet, an eighth of it: 18 PFLOPS dense bfloat16, 1,440 GB at 64 TB/s, "
            "NVLink 14.4 TB/s both ways, 8 × 400 Gb/s",
            max_devices=8, gpu=Gpu("NVIDIA B200", (10, 0), 148, 1.965, 126 * 2**20, **_HOPPER),
        ),
    )
}  # fmt: skip
