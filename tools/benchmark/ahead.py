"""The very train step compiled ahead of time for a TPU slice that need not be there: memory, kernels, seconds."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark.kit import SHAPES, model_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", default="v5e:4x4", help="v4, v5e, v5p or v6e and the shape of the slice")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--mode", choices=("lora", "full"), default="lora")
    parser.add_argument(
        "--rows", type=int, default=1, help="of a chip, or of the chips along sequence and tensor together, a step"
    )
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--mesh", default="1,-1,1,1", help="data,fsdp,sequence,tensor")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--quantization", choices=("int8", "nf4"))
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32", help="with --mode full")
    parser.add_argument("--moments", choices=("float32", "bfloat16", "factored"), default="float32")
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=bench_ahead)


def bench_ahead(options: argparse.Namespace) -> None:
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("bench: compiling for TPUs needs their compiler: pip install libtpu")
    # The compiler asks for a machine it could be on; no chip is looked for.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    found = compile_ahead(options)
    if options.json:
        print(json.dumps(found))
        return
    mib = {key: f"{value / 2**20:,.0f}" for key, value in found.items() if key.endswith("_bytes")}
    kept = options.quantization or (f"weights {options.weights}" if options.mode == "full" else "bfloat16")
    print(
        f"{options.shape} {options.mode} ({kept}, moments {options.moments}) on {options.topology}, "
        f"{options.rows}×{options.row_length} a chip, remat {options.remat}, attention {found['attention']}: "
        f"peak {mib['peak_bytes']} MiB a chip, {mib['argument_bytes']} of it weights, state and batch; "
        f"traced in {found['trace_seconds']:.1f} s, compiled in {found['compile_seconds']:.1f} s; "
        f"splash kernels in the program: {found['splash_calls']}"
    )


def compile_ahead(options: argparse.Namespace) -> dict[str, Any]:
    """Shapes and shardings in, a program out; nothing is allocated."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from sft_jax.config import LoraConfig, OptimizerConfig
    from sft_jax.hf.config import read_architecture
    from sft_jax.models.attention.kernel import choose_kernel
    from sft_jax.sharding import make_mesh, named_sharding
    from sft_jax.training.optimizer import labels_of, make_optimizer, make_schedule
    from sft_jax.training.state import abstract_state, state_shardings
    from sft_jax.training.step import make_train_step
    from sft_jax.training.weights import build
    from sft_jax.typing import Batch

    devices = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
    mesh = make_mesh(*map(int, options.mesh.split(",")), devices=devices)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model_config(options.shape, "bfloat16")))
        arch = read_architecture(Path(folder))
    if options.layers:
        arch = dataclasses.replace(arch, num_layers=options.layers)
    kernel = choose_kernel(options.attention, mesh, arch, "bfloat16", options.row_length)
    lora = LoraConfig(rank=16, alpha=32.0) if options.mode == "lora" else None
    split = build(
        arch, mesh, lora, "bfloat16", options.remat,
        kernel=kernel, quantization=options.quantization, weights=options.weights,
    )  # fmt: skip
    config = OptimizerConfig(moments=options.moments)
    optimizer = make_optimizer(config, labels_of(split.trainable, split.labels))
    step = make_train_step(
        split,
        optimizer,
        make_schedule(config, 1000),
        out_shardings=state_shardings(split.trainable, optimizer, mesh),
        rounding_key=jax.random.key(3),
    )
    state = abstract_state(split.trainable, optimizer, mesh)
    shape = (options.rows * mesh.shape["data"] * mesh.shape["fsdp"], options.row_length)
    sharding = named_sharding(mesh, ("batch", "length"), shape)
    ids: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding), ids, ids)  # type: ignore[arg-type]
    with jax.set_mesh(mesh):
        began = time.perf_counter()
        lowered = step.lower(state, split.frozen, batch)  # type: ignore[attr-defined]
        traced = time.perf_counter()
        program = lowered.compile()
        done = time.perf_counter()
    memory = program.memory_analysis()
    return {
        "attention": str(kernel),
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "trace_seconds": traced - began,
        "compile_seconds": done - traced,
        "splash_calls": lowered.as_text().count("splash"),
    }
