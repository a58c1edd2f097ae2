"""Measures how long a run takes to its first step: a first start, and a second one that finds what the first kept."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark.kit import SHAPES, make_kit
from benchmark.train import ENVIRONMENT, machine

# A phase ends with the first line that a run prints with one of these names.
PHASES = {
    "import": ("devices",),
    "read and tokenize": ("plan",),
    "build": ("optimizer",),
    "load and compile": ("compiled",),
    "first step": ("step 1/",),
}
STARTS = ("first", "second")
_TICKS = os.sysconf("SC_CLK_TCK")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", required=True, help="a .jsonl with question and answer, such as GSM8K's train.jsonl")
    parser.add_argument("--model", help="a Hugging Face folder; default: random weights of --shape")
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--mode", choices=("lora", "full"), default="lora")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--row-length", type=int, default=512, help="packed sequence length")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout to compare with")
    parser.add_argument("--kit", type=Path, help="folder to create and keep models in; default: a temporary one")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=bench_start)


def bench_start(options: argparse.Namespace) -> None:
    sides = {"this": Path(__file__).parents[2]}
    if options.against is not None:
        sides["other"] = options.against.resolve()
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {side: {start: [] for start in STARTS} for side in sides}
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model
        if model is None:
            model = str(make_kit(options.kit or Path(scratch), options.shape, Path(options.rows), options.dtype).folder)
        for i in range(options.rounds):
            for side in list(sides) if i % 2 == 0 else list(sides)[::-1]:
                with tempfile.TemporaryDirectory() as caches:
                    _keep_tokens(options, sides[side], model, Path(caches))
                    for start in STARTS:
                        one = measure(options, sides[side], model, Path(caches))
                        runs[side][start].append(one)
                        if not options.json:
                            seconds = ", ".join(f"{one[unit]:.2f} s {unit}" for unit in ("wall", "cpu"))
                            print(f"{side:>6} {start:>7} start  {seconds}", file=sys.stderr, flush=True)
    result = {"machine": machine("cpu"), "runs": runs}
    print(json.dumps(result) if options.json else as_text(result))


def _keep_tokens(options: argparse.Namespace, checkout: Path, model: str, caches: Path) -> None:
    """Tokenizes the rows, so that no start measures that: it depends on their number."""
    command = [sys.executable, "-m", "sft_jax", "inspect", "--rows", "1", *_arguments(options, model, caches / "none")]
    subprocess.run(command, env=_environment(checkout, caches), cwd=caches, check=True, capture_output=True)


def measure(options: argparse.Namespace, checkout: Path, model: str, caches: Path) -> dict[str, Any]:
    """Runs ``sft-jax train`` for one step in a process of its own.

    Returns:
        ``wall`` and ``cpu`` seconds until the line of the first step, and both by phase.
    """
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "sft_jax", "train", *_arguments(options, model, Path(out) / "run")]
        began = time.perf_counter()
        process = subprocess.Popen(
            command, env=_environment(checkout, caches), cwd=out, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        assert process.stderr is not None
        reached: dict[str, tuple[float, float]] = {}
        lines = []
        for line in process.stderr:
            now = time.perf_counter() - began, _cpu_seconds(process.pid)
            lines.append(line)
            for phase, names in PHASES.items():
                if phase not in reached and line.strip().startswith(names):
                    reached[phase] = now
        if process.wait() or len(reached) < len(PHASES):
            sys.exit(f"bench: sft-jax train failed in {checkout}:\n{''.join(lines)[-3000:]}")
    before, phases = (0.0, 0.0), {}
    for phase in PHASES:
        wall, cpu = reached[phase]
        phases[phase] = {"wall": wall - before[0], "cpu": cpu - before[1]}
        before = reached[phase]
    return {"wall": before[0], "cpu": before[1], "phases": phases}


def _cpu_seconds(pid: int) -> float:
    """Returns the CPU seconds of a process and of its children that have ended; zero where the system has no /proc."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.is_file():
        return 0.0
    fields = stat.read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS


def _arguments(options: argparse.Namespace, model: str, out: Path) -> list[str]:
    """Returns a config file, written beside ``out``, and overrides."""
    out.parent.mkdir(parents=True, exist_ok=True)
    config = out.parent / "start.yaml"
    lora = {"rank": 16, "alpha": 32.0} if options.mode == "lora" else None
    config.write_text(
        json.dumps(
            {
                "model": {"path": model, "dtype": options.dtype},
                "lora": lora,
                "data": {"train": [{"path": str(Path(options.rows).resolve())}], "max_length": options.row_length},
                "training": {"output_dir": str(out), "max_steps": 1, "batch_size": 1},
            }
        )
    )
    return [str(config)]


def _environment(checkout: Path, caches: Path) -> dict[str, str]:
    return ENVIRONMENT | os.environ | {"PYTHONPATH": str(checkout), "SFT_JAX_CACHE": str(caches / "sft-jax")}


def as_text(result: dict[str, Any]) -> str:
    """Formats medians as a table, and the ratios of this checkout to the other."""
    machine, runs = result["machine"], result["runs"]
    rounds = len(runs["this"]["first"])
    columns = [(side, start) for start in STARTS for side in runs]
    text = [
        f"{machine['cpu']}, {machine['cores']} cores; seconds to the first step, wall / CPU, medians of {rounds}",
        f"{'':20}" + "".join(f"{f'{start}, {side}':>18}" for side, start in columns),
    ]

    def median(side: str, start: str, unit: str, phase: str | None = None) -> float:
        of = [one if phase is None else one["phases"][phase] for one in runs[side][start]]
        return statistics.median(one[unit] for one in of)

    for phase in [*PHASES, None]:
        cells = (f"{median(*at, 'wall', phase):.2f} / {median(*at, 'cpu', phase):.2f}" for at in columns)
        text.append(f"{phase or 'to the first step':20}" + "".join(f"{cell:>18}" for cell in cells))
    if "other" in runs:
        for start in STARTS:
            ratios = (median("this", start, unit) / median("other", start, unit) for unit in ("wall", "cpu"))
            wall, cpu = ratios
            text.append(f"{start} start, this / other: {wall:.2f} of the wall time, {cpu:.2f} of the CPU time")
    return "\n".join(text)
