"""Benchmarks training against TRL with PEFT, and against the machine's rate of matrix products."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.kit import SHAPES, Kit, make_kit

NOT_MEASURED = "not measured"
# For all sides: the allocator uses pages of 2 MiB instead of 4 KiB for the temporary buffers of each step.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# Fraction of GPU memory; JAX's default is 0.75.
GPU_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
ENVIRONMENT = HUGE_PAGES | GPU_MEMORY | {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", required=True, help="a .jsonl with question and answer, such as GSM8K's train.jsonl")
    parser.add_argument("--shape", choices=SHAPES, default="50m")
    parser.add_argument("--mode", choices=("lora", "full"), default="lora")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--conversations", type=int, default=8, help="average per step")
    parser.add_argument("--row-length", type=int, default=640, help="packed sequence length")
    parser.add_argument("--steps", type=int, default=8, help="measured steps per process")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--remat", default="auto")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--quantization", choices=("int8", "nf4"))
    parser.add_argument("--param-dtype", choices=("float32", "bfloat16"), default="float32", help="with --mode full")
    parser.add_argument("--moments", choices=("float32", "bfloat16", "factored"), default="float32")
    parser.add_argument(
        "--peer-checkpointing", choices=("off", "on", "both"), default="both", help="TRL's gradient checkpointing"
    )
    parser.add_argument("--self-only", action="store_true", help="without TRL")
    parser.add_argument("--kit", type=Path, help="folder to create and keep models in; default: a temporary one")
    parser.add_argument("--out", type=Path, help="folder of bench.json and bench.png")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=bench_train)


def bench_train(options: argparse.Namespace) -> None:
    check_peer(options.self_only)
    with tempfile.TemporaryDirectory() as scratch:
        kit = make_kit(options.kit or Path(scratch), options.shape, Path(options.rows), options.dtype)
        result = compare(options, kit)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        plot(result, options.out / "bench.png")
    print(json.dumps(result) if options.json else as_text(result))


def check_peer(self_only: bool) -> None:
    """Exits if TRL should run but is not installed."""
    missing = [name for name in ("torch", "trl", "peft") if importlib.util.find_spec(name) is None]
    if missing and not self_only:
        sys.exit(f"bench: {', '.join(missing)} not installed; pip install -e '.[test]', or use --self-only")


def compare(options: argparse.Namespace, kit: Kit) -> dict[str, Any]:
    """Runs all sides alternately, each in its own process, and computes medians and ratios."""
    tokens_per_step = options.conversations * float(kit.lengths.mean() - 1)  # the last token of each has no target
    common = {
        "kit": str(kit.folder),
        "batch_size": max(1, round(tokens_per_step / 0.98 / options.row_length)),
        **{
            name: getattr(options, name)
            for name in ("mode", "dtype", "steps", "warmup", "row_length", "remat", "attention", "quantization",
                         "param_dtype", "moments", "conversations")
        },
    }  # fmt: skip
    sides = {"sft_jax": ("sft_jax", common)}
    if not options.self_only:
        for name, checkpointing in (("trl", False), ("trl, checkpointing", True)):
            if options.peer_checkpointing in ("both", "on" if checkpointing else "off"):
                sides[name] = ("trl", common | {"checkpointing": checkpointing})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    ceilings = []
    for i in range(options.rounds):
        ceilings.append(run_process("ceiling", common, options.json))
        for name in list(sides) if i % 2 == 0 else list(sides)[::-1]:
            runs[name].append(run_process(*sides[name], options.json))
    result: dict[str, Any] = {
        "options": {key: str(value) for key, value in vars(options).items() if key != "run"},
        "machine": machine(ceilings[0]["device"]),
        "ceiling_gflops": statistics.median(one["gflops"] for one in ceilings),
        "ceiling_by_shape": ceilings[0]["by_shape"],
        "sides": {name: summarize(one) for name, one in runs.items()},
        "runs": runs,
    }
    ours = result["sides"]["sft_jax"]
    result["model_gflops"] = model_rate(kit, options.mode, runs["sft_jax"]) / 1e9
    result["share_of_ceiling"] = result["model_gflops"] / result["ceiling_gflops"]
    result["ratios"] = {
        name: {
            "tokens_per_second": ours["tokens_per_second"]["median"] / side["tokens_per_second"]["median"],
            **{
                key: ours[key]["median"] / side[key]["median"] if ours[key] and side[key] else None
                for key in ("host_peak_bytes", "device_peak_bytes", "seconds_to_first_step")
            },
        }
        for name, side in result["sides"].items()
        if name != "sft_jax"
    }
    return result


def run_process(who: str, options: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """Runs a side in its own process; returns the JSON that it prints, plus the seconds from start to first step."""
    began = time.time()
    done = subprocess.run(
        [sys.executable, sys.argv[0], "one-train", who, json.dumps(options)],
        env=ENVIRONMENT | os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"bench: {who} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    if "first_step_at" in result:
        result["seconds_to_first_step"] = result.pop("first_step_at") - began
        if not quiet:
            rate = sum(result["real_tokens"]) / sum(result["step_seconds"])
            print(f"{who:>10}  {rate:8,.0f} real tokens/s", file=sys.stderr, flush=True)
    return result


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Computes medians and ranges over the runs of a side."""

    def spread(values: list[float | None]) -> dict[str, float] | None:
        known = [value for value in values if value is not None]
        return {"median": statistics.median(known), "low": min(known), "high": max(known)} if known else None

    return {
        "tokens_per_second": spread([sum(run["real_tokens"]) / sum(run["step_seconds"]) for run in runs]),
        "step_seconds": spread([statistics.median(run["step_seconds"]) for run in runs]),
        "tokens_per_step": spread([float(np.mean(run["real_tokens"])) for run in runs]),
        "filled": spread([sum(run["real_tokens"]) / sum(run["all_tokens"]) for run in runs]),
        **{
            key: spread([run.get(key) for run in runs])
            for key in ("host_peak_bytes", "device_peak_bytes", "seconds_to_first_step", "compile_seconds")
        },
        "first_losses": runs[0]["losses"][:4],
        "choices": {key: runs[0][key] for key in ("remat", "attention") if key in runs[0]},
    }


def model_rate(kit: Kit, mode: str, runs: list[dict[str, Any]]) -> float:
    """Median model FLOP/s of the runs, with the document lengths of the whole file."""
    from sft_jax.config import LoraConfig
    from sft_jax.hf.config import read_architecture
    from sft_jax.models.work import Work
    from sft_jax.planning.flops import Sizes, model_flops
    from sft_jax.sharding import make_mesh
    from sft_jax.training.weights import build

    lengths = kit.lengths - 1.0
    per_token = float((lengths**2).sum() / lengths.sum())
    lora = LoraConfig(rank=16) if mode != "full" else None
    sizes = Sizes.of(build(read_architecture(kit.folder), make_mesh(), lora, "float32"))
    rates = []
    for run in runs:
        tokens = sum(run["real_tokens"])
        work = Work(tokens, sum(run["target_tokens"]), tokens * per_token)
        rates.append(model_flops(sizes, work) / sum(run["step_seconds"]))
    return statistics.median(rates)


def machine(device: str) -> dict[str, Any]:
    """Describes the hardware and the package versions."""
    names = ("jax", "flax", "optax", "torch", "trl", "peft", "transformers")
    model = [
        line.split(":", 1)[1].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else [])
        if line.startswith("model name")
    ]
    return {
        "device": device,
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", HUGE_PAGES["GLIBC_TUNABLES"]),
        "versions": {name: version(name) for name in names if importlib.util.find_spec(name) is not None},
    }


def as_text(result: dict[str, Any]) -> str:
    """Formats a result as a table."""

    def cell(value: dict[str, float] | None, scale: float = 1.0, digits: int = 0) -> str:
        if value is None:
            return NOT_MEASURED
        low, high = (f"{value[key] / scale:,.{digits}f}" for key in ("low", "high"))
        return f"{value['median'] / scale:,.{digits}f} ({low}–{high})"

    lines = [
        ("real tokens/s", "tokens_per_second", 1, 0),
        ("real tokens per step", "tokens_per_step", 1, 0),
        ("seconds per step", "step_seconds", 1, 2),
        ("packing efficiency, %", "filled", 0.01, 1),
        ("peak host memory, GB", "host_peak_bytes", 1e9, 2),
        ("peak device memory, GB", "device_peak_bytes", 1e9, 2),
        ("seconds to the first step", "seconds_to_first_step", 1, 1),
        ("of these, compiling", "compile_seconds", 1, 1),
    ]
    sides = result["sides"]
    machine = result["machine"]
    options = result["options"]
    text = [
        f"{machine['device']}, {machine['cpu']}, {machine['cores']} cores; {options['shape']} {options['mode']} "
        f"{options['dtype']}; medians of {options['rounds']} runs",
        f"{'':28}" + "".join(f"{name:>26}" for name in sides),
    ]
    for title, key, scale, digits in lines:
        text.append(f"{title:28}" + "".join(f"{cell(side[key], scale, digits):>26}" for side in sides.values()))
    text.append(f"{'first losses':28}" + "".join(
        f"{' '.join(f'{loss:.2f}' for loss in side['first_losses']):>26}" for side in sides.values()))  # fmt: skip
    text.append("")
    for name, ratios in result["ratios"].items():
        memory = ratios["device_peak_bytes"] or ratios["host_peak_bytes"]
        text.append(
            f"sft_jax / {name}: {ratios['tokens_per_second']:.2f} × the real tokens/s, {memory:.2f} × the peak memory, "
            f"{ratios['seconds_to_first_step']:.2f} × the time to the first step"
        )
    text.append(
        f"model FLOPs: {result['model_gflops']:,.0f} GFLOP/s, {result['share_of_ceiling']:.1%} of "
        f"{result['ceiling_gflops']:,.0f} GFLOP/s for matrix products alone"
    )
    return "\n".join(text)


def plot(result: dict[str, Any], path: Path) -> None:
    """Plots tokens/s and memory of each side as bars with their range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    on_device = all(side["device_peak_bytes"] for side in result["sides"].values())
    memory = "device_peak_bytes" if on_device else "host_peak_bytes"
    for axis, key, scale, title in (
        (axes[0], "tokens_per_second", 1.0, "real tokens/s"),
        (axes[1], memory, 1e9, f"peak {'device' if on_device else 'host'} memory, GB"),
    ):
        names = list(result["sides"])
        values = [result["sides"][name][key] for name in names]
        middle = np.asarray([value["median"] for value in values]) / scale
        spread = (
            np.asarray([[v["median"] - v["low"] for v in values], [v["high"] - v["median"] for v in values]]) / scale
        )
        axis.bar(names, middle, yerr=spread, color=["#2b6cb0", "#a0aec0", "#cbd5e0"][: len(names)], capsize=3)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{result['options']['shape']}, {result['options']['mode']}, {result['machine']['device']}", fontsize=10
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
