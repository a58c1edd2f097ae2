"""Compiles the train step of a shape ahead of time with ``sft-jax plan``: memory and the compiler's cycles."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmark.kit import SHAPES, model_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", default="v5e:4x4", help="a chip and the shape of the slice, such as v5e:4x4")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--mode", choices=("lora", "full"), default="lora")
    parser.add_argument(
        "--rows", type=int, default=1, help="sequences per batch shard (the chips along sequence and tensor)"
    )
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--mesh", default="1,-1,1,1", help="data,fsdp,sequence,tensor")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--quantization", choices=("int8", "nf4"))
    parser.add_argument("--compute", choices=("int8", "fp8"), help="products of linear layers in eight bits")
    parser.add_argument("--param-dtype", choices=("float32", "bfloat16"), default="float32", help="with --mode full")
    parser.add_argument("--moments", choices=("float32", "bfloat16", "factored"), default="float32")
    parser.add_argument("--layers", type=int, help="number of layers; default: that of the shape")
    parser.add_argument("--keep-text", type=Path, metavar="FILE", help="write the program's optimized HLO text")
    parser.add_argument("--profile", action="store_true", help="list the source lines above their peak")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=bench_ahead)


def bench_ahead(options: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from sft_jax.planning.compiled_time import compiled_text

    result = compile_ahead(options)
    if options.json:
        print(json.dumps(result))
        return
    mib = {key: f"{result[key] / 2**20:,.0f}" for key in ("peak_bytes", "argument_bytes")}
    stored = options.quantization or (f"weights {options.param_dtype}" if options.mode == "full" else "bfloat16")
    print(
        f"{options.shape} {options.mode} ({stored}, moments {options.moments}) on {options.topology}, "
        f"{options.rows}×{options.row_length} per batch shard, remat {result['remat']}, attention "
        f"{result['attention']}: peak {mib['peak_bytes']} MiB per chip, {mib['argument_bytes']} of it weights, "
        f"optimizer state and batch; traced and compiled in {result['compile_seconds']:.1f} s"
    )
    print("\n".join(compiled_text(result["compiled"])))


def compile_ahead(options: argparse.Namespace) -> dict[str, Any]:
    """Runs ``plan`` on a config with these options."""
    from sft_jax.config import (
        Config,
        DataConfig,
        LoraConfig,
        MeshConfig,
        ModelConfig,
        OptimizerConfig,
        SourceConfig,
        TrainingConfig,
    )
    from sft_jax.planning.plan import plan
    from sft_jax.planning.topology import parse_topology

    mesh = MeshConfig(*map(int, options.mesh.split(",")))
    shards = parse_topology(options.topology).num_devices // (mesh.sequence * mesh.tensor)
    config = Config(
        model=ModelConfig(
            path=options.shape,
            remat=options.remat,
            attention=options.attention,
            quantization=options.quantization,
            compute=options.compute,
            param_dtype=options.param_dtype,
        ),
        lora=LoraConfig() if options.mode == "lora" else None,
        data=DataConfig(train=[SourceConfig(path="none")], max_length=options.row_length),
        optimizer=OptimizerConfig(moments=options.moments),
        training=TrainingConfig(output_dir="none", batch_size=options.rows * shards),
        mesh=mesh,
    )
    shape = model_config(options.shape, "bfloat16")
    if options.layers:
        shape["num_hidden_layers"] = options.layers
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(shape))
        file.flush()
        return plan(
            config,
            options.topology,
            Path(file.name),
            advice=False,
            profile=options.profile,
            quiet=True,
            keep_text=options.keep_text,
        )
