"""Compiler options: for TPUs, how products gather weights; for GPUs, repeatable results; for CPUs, quick compiling."""

from __future__ import annotations

from sft_jax.cpu_compiler import cpu_options
from sft_jax.models.split import Split

# Overlap each all-gather with one product, not in steps with several. The compiler estimates that products which share
# an all-gather take up to half as long again; their gathered weights also stay in memory for longer.
_ONE_PRODUCT_PER_GATHER = {"xla_tpu_enable_async_collective_fusion_multiple_steps": "false"}
# No collective matmul, whatever the size of the product; see sft_jax.models.weight_gradient for gradients.
_NO_COLLECTIVE_MATMUL = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# On-chip memory that a fusion may use, of 128 MiB; by default 16 MiB. For a LoRA step of Llama-3.1-8B on 16 TPU v5e,
# four sequences each, the compiler estimates 4,093 million cycles by default, 3,539 with 32 MiB, 3,411 with 48 and
# 3,432 with 64; it takes 64, 94, 158 and some 500 CPU seconds. Full fine-tuning: 3,992 with 48 MiB and 4,070 with 96.
_MEMORY_OF_A_FUSION = {"xla_tpu_scoped_vmem_limit_kib": str(48 * 1024)}
# No sums in an order that depends on timing, and no kernels chosen by timing them. TPUs and CPUs have neither.
_DETERMINISTIC: dict[str, str | bool] = {"xla_gpu_deterministic_ops": True}


def compiler_options(split: Split, deterministic: bool = False) -> dict[str, str | bool | int]:
    """Returns ``compiler_options`` for ``jax.jit`` of a program of this model on the devices of its parameters.

    By default the TPU compiler runs a product with a weight sharded over N devices as a collective matmul of N steps:
    the shards go round, and each step reads and writes the partial sums again, in the compute dtype. A weight that is
    all-gathered during an earlier product is read once and summed in float32. For Llama-3.1-8B on 16 TPU v5e the
    compiler estimated 1,510 instead of 2,884 million cycles for a step of the LoRA recipe. All-gathers that no product
    hides add some 45.

    Args:
        deterministic: whether the same program and inputs give the same bits on GPUs too.
    """
    device = split.mesh.devices.flat[0]
    if device.platform == "gpu" and deterministic:
        return dict(_DETERMINISTIC)
    if device.platform != "tpu":
        return cpu_options(device)
    return {**_ONE_PRODUCT_PER_GATHER, **_NO_COLLECTIVE_MATMUL, **_MEMORY_OF_A_FUSION}
