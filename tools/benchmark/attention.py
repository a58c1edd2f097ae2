"""Measures the error and time of the attention backends of this device."""

from __future__ import annotations

import argparse
import json
import sys
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmark.timing import median_seconds
from sft_jax.errors import UserError
from sft_jax.models.attention.backend import NAMES, Backend, attention, choose_backend
from sft_jax.models.attention.parity import WINDOW, check_parity
from sft_jax.models.attention.spec import AttentionSpec
from sft_jax.sharding import make_mesh

MEAN, DEVIATION = 210.0, 70.0  # lengths of short documents, about those of GSM8K
# Defaults on an accelerator and on a CPU, where they take a minute.
SIZES = {"tokens": 16_384, "lengths": [2048, 8192], "head_dims": [64, 128]}
SIZES_ON_CPU = {"tokens": 2048, "lengths": [2048], "head_dims": [64]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, help="tokens of the batch; default: 16,384, on a CPU 2,048")
    parser.add_argument(
        "--lengths", nargs="+", type=int, help="sequence lengths; default: 2,048 and 8,192, on a CPU 2,048"
    )
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dims", nargs="+", type=int, help="default: 64 and 128, on a CPU 64")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=bench_attention)


def bench_attention(options: argparse.Namespace) -> None:
    for name, size in (SIZES_ON_CPU if jax.default_backend() == "cpu" else SIZES).items():
        if getattr(options, name) is None:
            setattr(options, name, size)
    results: list[dict[str, Any]] = []
    log = partial(print, file=sys.stderr if options.json else sys.stdout, flush=True)
    log(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.dtype}, {options.tokens:,} tokens")
    for head_dim in options.head_dims:
        for length in options.lengths:
            for backend in _backends(options, head_dim, length):
                one: dict[str, Any] = {"backend": backend.name, "head_dim": head_dim, "length": length}
                try:
                    one["error"] = _error(backend, options.heads // options.kv_heads, head_dim, options.dtype)
                    for kind in ("short", "whole"):
                        one[kind] = _seconds(options, backend, head_dim, length, kind)
                except UserError as error:
                    one["refused"] = str(error)
                results.append(one)
                log(_line(one))
    if options.json:
        print(json.dumps(results))


def _backends(options: argparse.Namespace, head_dim: int, length: int) -> list[Backend]:
    """Returns the backends of this device that support this head size and sequence length."""
    spec = AttentionSpec(options.heads, options.kv_heads, head_dim)
    backends = []
    for name in NAMES:
        try:
            backends.append(choose_backend(name, make_mesh(), [spec], options.dtype, length))
        except UserError:
            continue
    return backends


@cache  # does not depend on the sequence length
def _error(backend: Backend, group: int, head_dim: int, dtype: str) -> float:
    """Largest relative error of outputs and gradients; see :func:`check_parity`."""
    return check_parity(backend.name, partial(attention, backend=backend), group, head_dim, [None, WINDOW], dtype=dtype)


def _seconds(options: argparse.Namespace, backend: Backend, head_dim: int, length: int, kind: str) -> list[float]:
    """Median seconds of the forward pass, and of the forward and backward pass."""
    batch_size = max(1, options.tokens // length)
    rng = np.random.default_rng(0)
    segments = np.ones((batch_size, length), np.int32)
    if kind == "short":
        for ids in segments:
            edges = np.cumsum(np.clip(rng.normal(MEAN, DEVIATION, length), 16, None).astype(int))
            ids[:] = 1 + np.searchsorted(edges, np.arange(length), side="right")
    sizes = [(batch_size, length, num, head_dim) for num in (options.heads, options.kv_heads, options.kv_heads)]
    q, k, v = (jax.random.normal(jax.random.key(i), size, options.dtype) for i, size in enumerate(sizes))

    forward = partial(attention, backend=backend)

    def both(q: Any, k: Any, v: Any, segments: Any) -> Any:
        out, pullback = jax.vjp(lambda q, k, v: forward(q, k, v, segments), q, k, v)
        return pullback(out)

    return [median_seconds(jax.jit(run), (q, k, v, jnp.asarray(segments)), options.repeats) for run in (forward, both)]


def _line(one: dict[str, Any]) -> str:
    title = f"head size {one['head_dim']}, length {one['length']:,}  {one['backend']:>10}  "
    if "refused" in one:
        return title + one["refused"]
    times = "; ".join(
        f"{title} {one[kind][0] * 1e3:,.2f} ms, with gradients {one[kind][1] * 1e3:,.2f}"
        for kind, title in (("short", "short documents"), ("whole", "one document"))
    )
    return f"{title}error {one['error']:.1e}; {times}"
