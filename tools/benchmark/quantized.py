"""Times products with a quantized weight: by a kernel that dequantizes tiles, and with the weight dequantized first.

``--interpret`` interprets the kernels, on any device; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

from benchmark.timing import median_seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 128, 1024, 8192], help="tokens")
    parser.add_argument("--size", type=int, nargs=2, default=[4096, 14336], help="inputs and outputs of the weight")
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=bench_quantized)


def bench_quantized(options: argparse.Namespace) -> None:
    results = []
    for method in ("nf4", "int8"):
        for rows in options.rows:
            for transposed in (False, True):
                results.append(one := _measured(method, rows, transposed, options))
                if not options.json:
                    print(_line(one), flush=True)
    if options.json:
        print(json.dumps(results))


def _line(one: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {one[f'{name}_seconds'] * 1e3:,.3f} ms" for name in ("kernel", "dequantized"))
    return (
        f"{one['method']}, {one['rows']:,} rows, {'transposed' if one['transposed'] else 'forward'}: {times}, ratio "
        f"{one['ratio']:.2f}, relative difference {one['difference']:.1e}"
    )


def _measured(method: str, rows: int, transposed: bool, options: argparse.Namespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from sft_jax.models.quantize import dequantize, linear_format, quantize
    from sft_jax.models.quantized_product import quantized_dot

    fmt = linear_format(method, *options.size)
    arrays = quantize(jax.random.normal(jax.random.key(0), options.size), fmt)
    x = jax.random.normal(jax.random.key(1), (rows, options.size[transposed]), jnp.bfloat16)

    def dequantized(x: Any, arrays: Any) -> Any:
        weight = dequantize(arrays, fmt, x.dtype)
        return jnp.dot(x, weight.T if transposed else weight)

    kernel = partial(quantized_dot, fmt=fmt, transposed=transposed, interpret=options.interpret)
    programs = jax.jit(kernel), jax.jit(dequantized)
    ours, expected = (program(x, arrays).astype(jnp.float32) for program in programs)
    of_kernel, of_dequantized = (median_seconds(program, (x, arrays)) for program in programs)
    return {
        "method": method,
        "rows": rows,
        "transposed": transposed,
        "kernel_seconds": of_kernel,
        "dequantized_seconds": of_dequantized,
        "ratio": of_dequantized / of_kernel,
        "difference": float(jnp.abs(ours - expected).max() / jnp.abs(expected).max()),
    }
