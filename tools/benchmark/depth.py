"""Measures the host's cost of depth: seconds to trace, to compile, and to dispatch each step."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any, NamedTuple

# Pause before each dispatch, about as long as a real step. Directly after a step of a millisecond the host's caches are
# still warm, which halves the time.
REST_SECONDS = 0.03


class Compiled(NamedTuple):
    program: Any
    arguments: list[Any]
    num_arrays: int
    trace_seconds: float
    compile_seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--mode", choices=("lora", "full"), default="lora")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=bench_depth)


def bench_depth(options: argparse.Namespace) -> None:
    steps = [compiled(layers, options.mode) for layers in options.layers]
    seconds = dispatch(steps, options.steps)
    rows = [
        {
            "layers": layers,
            "leaves": step.num_arrays,
            "trace_seconds": step.trace_seconds,
            "compile_seconds": step.compile_seconds,
            "host_seconds": host,
        }
        for layers, step, host in zip(options.layers, steps, seconds, strict=True)
    ]
    if options.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(
            f"{row['layers']:3} layers: {row['leaves']} arrays, traced in {row['trace_seconds']:.2f} s, compiled in "
            f"{row['compile_seconds']:.2f} s, a step dispatched in {row['host_seconds'] * 1e6:,.0f} µs"
        )


def dispatch(steps: list[Compiled], num_steps: int) -> list[float]:
    """Median seconds to dispatch each of the steps, measured alternately."""
    import jax

    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(num_steps):
        for step, times in zip(steps, seconds, strict=True):
            time.sleep(REST_SECONDS)
            began = time.perf_counter()
            step.arguments[0], metrics = step.program(*step.arguments)
            times.append(time.perf_counter() - began)
            jax.block_until_ready((step.arguments[0], metrics))
    return [statistics.median(times) for times in seconds]


def compiled(layers: int, mode: str) -> Compiled:
    """Compiles the step of a narrow network, whose device time is short next to the host's."""
    import jax
    import jax.numpy as jnp

    from sft_jax.config import LoraConfig, OptimizerConfig
    from sft_jax.models.architecture import Architecture, Norm, Rope
    from sft_jax.models.attention.module import SelfAttentionSpec
    from sft_jax.models.families.standard import PRE_NORM
    from sft_jax.models.mlp import MLPSpec
    from sft_jax.sharding import make_mesh
    from sft_jax.training.optimizer import labels_of, make_optimizer, make_schedule
    from sft_jax.training.state import make_state, state_shardings
    from sft_jax.training.step import make_train_step
    from sft_jax.training.weights import build, load_weights
    from sft_jax.typing import Batch

    norm = Norm(1e-5)
    layer = PRE_NORM.layer(SelfAttentionSpec(2, 1, 16, rope=Rope(1e4)), MLPSpec(64), norm)
    arch = Architecture("llama", 256, 32, (layer,) * layers, norm, tie_word_embeddings=True)
    lora = LoraConfig(rank=4, alpha=8.0) if mode == "lora" else None
    mesh = make_mesh()
    split = build(arch, mesh, lora, "float32")
    params, frozen = load_weights(split, None, lora)
    config = OptimizerConfig()
    optimizer = make_optimizer(config, labels_of(split.trainable, split.labels))
    state = make_state(params, optimizer, mesh)
    step = make_train_step(
        split,
        optimizer,
        make_schedule(config, 1000),
        out_shardings=state_shardings(split.trainable, optimizer, mesh),
    )
    ids = jnp.zeros((len(jax.devices()), 64), jnp.int32)
    batch = Batch(ids, ids, jnp.ones(ids.shape, jnp.float32), ids + 1, ids)
    with jax.set_mesh(mesh):
        began = time.perf_counter()
        lowered = step.lower(state, frozen, batch)  # type: ignore[attr-defined]
        traced = time.perf_counter()
        program = lowered.compile()
        done = time.perf_counter()
    arguments = [state, frozen, batch]
    return Compiled(program, arguments, len(jax.tree.leaves((state, frozen))), traced - began, done - traced)
