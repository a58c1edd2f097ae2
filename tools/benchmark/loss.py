"""Compares the fused ``lm_head`` and loss with the plain formula: time by fraction of targets, gradients, memory.

``--topology v5e:1x1`` compiles both ahead of time for that chip in bfloat16 and reports only their memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--topology", help="a single chip: compile ahead of time, report memory")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=bench_loss)


def bench_loss(options: argparse.Namespace) -> None:
    if options.topology:
        _ahead(options)
    else:
        _measured(options)


def _functions(targets: Any) -> tuple[Any, Any]:
    """Returns the fused and the plain loss as functions of hidden states, ``lm_head`` weight and loss mask."""
    import jax
    import jax.numpy as jnp

    from sft_jax.models.head import Head
    from sft_jax.training.cross_entropy import masked_cross_entropy

    def plain(hidden: Any, weight: Any, mask: Any) -> Any:
        log_probs = jax.nn.log_softmax(jnp.dot(hidden, weight, preferred_element_type=jnp.float32))
        return -jnp.sum(mask * jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0])

    def fused(hidden: Any, weight: Any, mask: Any) -> Any:
        return masked_cross_entropy(hidden, Head(weight, 1, hidden.dtype), targets, mask)[0]

    return fused, plain


def _ahead(options: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from sft_jax.planning.topology import devices_of, parse_topology

    sharding = SingleDeviceSharding(devices_of(parse_topology(options.topology))[0])
    n, v, d = options.tokens, options.vocab, options.dim

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    arguments = array(1, n, d), array(d, v), array(1, n, dtype=jnp.float32), array(1, n, dtype=jnp.int32)
    sizes = {}
    for trained in (False, True):
        for i, name in enumerate(("fused", "plain")):

            def loss(hidden: Any, weight: Any, mask: Any, targets: Any, i: int = i) -> Any:
                return _functions(targets)[i](hidden, weight, mask)

            program = jax.jit(jax.value_and_grad(loss, (0, 1) if trained else 0)).lower(*arguments).compile()
            memory: Any = program.memory_analysis()
            sizes[f"{name}, head {'trained' if trained else 'frozen'}"] = memory.temp_size_in_bytes
    if options.json:
        print(json.dumps(sizes))
        return
    print(f"{n} tokens, {d} dimensions, vocabulary {v}, bfloat16, {options.topology}, temporary MiB:")
    for name, size in sizes.items():
        print(f"{name:20} {size / 2**20:8,.0f}")


def _measured(options: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 4)
    n, v, d = options.tokens, options.vocab, options.dim
    hidden = jax.random.normal(keys[0], (1, n, d))
    weight = 0.05 * jax.random.normal(keys[1], (d, v))
    fused, plain = _functions(jax.random.randint(keys[2], (1, n), 0, v))
    rows = []
    for trained in (False, True):
        for share in (1.0, 0.5, 0.25):
            mask = (jax.random.uniform(keys[3], (1, n)) < share).astype(jnp.float32)
            wanted = (0, 1) if trained else 0
            programs = [
                jax.jit(jax.value_and_grad(f, wanted)).lower(hidden, weight, mask).compile() for f in (fused, plain)
            ]
            results = [program(hidden, weight, mask) for program in programs]
            times: list[list[float]] = [[], []]
            for _ in range(options.rounds):
                for program, seconds in zip(programs, times, strict=True):
                    began = time.perf_counter()
                    jax.block_until_ready(program(hidden, weight, mask))
                    seconds.append(time.perf_counter() - began)
            ours, reference = (statistics.median(one) for one in times)
            pairs = zip(*(jax.tree.leaves(gradients) for _, gradients in results), strict=True)
            differences = [float(jnp.max(jnp.abs(one - other)) / jnp.max(jnp.abs(other))) for one, other in pairs]
            analyses: list[Any] = [program.memory_analysis() for program in programs]
            memory = [one.temp_size_in_bytes for one in analyses]
            rows.append(
                {
                    "head": "trained" if trained else "frozen",
                    "share_of_targets": share,
                    "seconds": ours,
                    "plain_seconds": reference,
                    "ratio": ours / reference,
                    "temp_bytes": memory[0],
                    "plain_temp_bytes": memory[1],
                    "largest_relative_difference_of_gradients": max(differences),
                }
            )
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{n} tokens, {d} dimensions, vocabulary {v}, float32, {jax.devices()[0].device_kind}")
    for row in rows:
        print(
            f"lm_head {row['head']:8} {row['share_of_targets']:5.0%} targets: {row['seconds'] * 1e3:7.1f} ms, plain "
            f"{row['plain_seconds'] * 1e3:7.1f} ms, ratio {row['ratio']:.2f}; temporary "
            f"{row['temp_bytes'] / 2**20:,.0f} against {row['plain_temp_bytes'] / 2**20:,.0f} MiB; "
            f"largest relative difference of gradients {row['largest_relative_difference_of_gradients']:.1e}"
        )
