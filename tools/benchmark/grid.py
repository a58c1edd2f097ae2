"""Benchmarks training for several shapes, methods and sequence lengths on one accelerator in minutes.

:mod:`benchmark.train` starts a process for each case. Here two processes with all imports done serve all cases: one
forks for each case of this library, and one trains all cases with TRL. Measures steps and device memory, not startup.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmark.kit import SHAPES, Kit, make_kit
from benchmark.runners import RESULT
from benchmark.train import ENVIRONMENT, check_peer, machine, model_rate

CASE_SECONDS = 180  # timeout of a case
ON_A_CPU = ("50m", "135m")  # shapes that are small enough for a CPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", required=True, help="a .jsonl with question and answer, such as GSM8K's train.jsonl")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "8b"])
    parser.add_argument("--modes", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192], help="packed sequence lengths")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens per step, including padding")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="also that of trained weights"
    )
    parser.add_argument("--steps", type=int, default=4, help="measured steps per case")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--self-only", action="store_true", help="without TRL")
    parser.add_argument(
        "--sparing",
        choices=("no", "also", "only"),
        default="no",
        help="this library with full rematerialization, TRL without gradient checkpointing",
    )
    parser.add_argument("--minutes", type=float, help="start no case after this time")
    parser.add_argument("--kit", type=Path, help="folder to create and keep models in; default: a temporary one")
    parser.add_argument("--out", type=Path, help="folder of grid.jsonl, with one line per finished case")
    parser.set_defaults(run=bench_grid)


def bench_grid(options: argparse.Namespace) -> None:
    check_peer(options.self_only)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        servers = {who: Server(who, Path(scratch)) for who in ("sft_jax", *(() if options.self_only else ("trl",)))}
        folder = options.kit or Path(scratch)
        results = []
        try:
            large = [shape for shape in options.shapes if shape not in ON_A_CPU]
            if large and _answer(servers, "device", {})["platform"] == "cpu":  # before kits of many GB are written
                sys.exit(
                    f"bench: nothing was measured: {', '.join(large)} need an accelerator, and JAX found none; on a "
                    f"CPU use `bench.py train`, or --shapes {' '.join(ON_A_CPU)} --tokens 1024 --lengths 512"
                )
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
            kits = {shape: make_kit(folder, shape, Path(options.rows), options.dtype) for shape in options.shapes}
            ceiling = _answer(servers, "ceiling", _options(options, kits[options.shapes[0]], "lora", 2048, {}))
            print(_heading(ceiling), flush=True)
            for case in _cases(options):
                kit, who = kits[case["shape"]], case["who"]
                if options.minutes is not None and time.monotonic() - began > options.minutes * 60:
                    run = {"error": f"not measured: past the limit of {options.minutes:g} minutes"}
                else:
                    run = servers[who](who, _options(options, kit, case["mode"], case["length"], case["how"]))
                results.append(_record(options, kit, ceiling, case, run))
        finally:
            for server in servers.values():
                server.close()
    print("\n".join(["", *_ratios(results)]))


def _answer(servers: dict[str, Server], what: str, options: dict[str, Any]) -> dict[str, Any]:
    """Runs a required measurement on this library's side; exits if it fails."""
    result = servers["sft_jax"](what, options)
    if "error" in result:
        sys.exit(f"bench: nothing was measured: {result['error']}")
    return result


def _cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Lists the cases: both defaults first, then rematerialization here against no checkpointing in TRL."""
    sides = [("sft_jax", {"remat": "auto"}), ("trl", {"checkpointing": True})]
    rounds = [] if options.sparing == "only" else [sides]
    if options.sparing != "no":
        rounds.append([("sft_jax", {"remat": "full"}), ("trl", {"checkpointing": False})])
    return [
        {"shape": shape, "mode": mode, "length": length, "who": who, "how": how}
        for round_ in rounds
        for shape in options.shapes
        for length in options.lengths
        for mode in options.modes
        for who, how in round_
        if who == "sft_jax" or not options.self_only
    ]


def _options(options: argparse.Namespace, kit: Kit, mode: str, length: int, how: dict[str, Any]) -> dict[str, Any]:
    stored = options.dtype if mode == "full" else "float32"
    return {
        "kit": str(kit.folder),
        "mode": mode,
        "dtype": options.dtype,
        "steps": options.steps,
        "warmup": options.warmup,
        "row_length": length,
        "batch_size": max(1, options.tokens // length),
        "conversations": max(1, round(options.tokens / float(kit.lengths.mean()))),
        "attention": "auto",
        "quantization": None,
        "param_dtype": stored,
        "moments": stored,
        **how,
    }


def _record(
    options: argparse.Namespace, kit: Kit, ceiling: dict[str, Any], case: dict[str, Any], run: dict[str, Any]
) -> dict[str, Any]:
    """Prints and writes the result of a case, and returns it."""
    result: dict[str, Any] = {**case, "device": ceiling["device"], "ceiling_gflops": ceiling["gflops"], "run": run}
    if "error" not in run:
        seconds = statistics.median(run["step_seconds"])
        # By the median step, so that an interrupted step does not count.
        result["tokens_per_second"] = sum(run["real_tokens"]) / len(run["real_tokens"]) / seconds
        scale = sum(run["step_seconds"]) / (seconds * len(run["step_seconds"]))
        result["share_of_ceiling"] = model_rate(kit, case["mode"], [run]) * scale / 1e9 / ceiling["gflops"]
    if options.out:
        with (options.out / "grid.jsonl").open("a", encoding="utf-8") as file:
            print(json.dumps(result), file=file)
    print(_line(result), flush=True)
    return result


def _heading(ceiling: dict[str, Any]) -> str:
    about = machine(ceiling["device"])
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return (
        f"{about['device']}, {about['cpu']}; {versions}\n"
        f"matrix products alone: {ceiling['gflops'] / 1e3:,.1f} TFLOP/s\n"
        f"{'':30}{'real tokens/s':>15}{'of products':>13}{'peak, GB':>10}"
    )


def _line(result: dict[str, Any]) -> str:
    title = f"{result['shape']} {result['mode']} {result['length']:,}  {_side(result)}"
    run = result["run"]
    if "error" in run:
        return f"{title:40}  {run['error']}"
    chosen = " ".join(str(run[key]) for key in ("attention", "remat") if key in run)
    speed, share = result["tokens_per_second"], result["share_of_ceiling"]
    return f"{title:40}{speed:>10,.0f}{share:>12.1%}{_peak(result) / 1e9:>10.2f}  {chosen}"


def _side(result: dict[str, Any]) -> str:
    """Names a side and its rematerialization."""
    how = result["how"]
    if how.get("checkpointing"):
        return f"{result['who']}, checkpointing"
    return f"{result['who']}, recomputing" if how.get("remat") == "full" else result["who"]


def _peak(result: dict[str, Any]) -> float:
    return result["run"]["device_peak_bytes"] or result["run"]["host_peak_bytes"]


def _ratios(results: list[dict[str, Any]]) -> list[str]:
    """Ratios of this library to TRL for all pairs of cases with equal shape, method and length."""
    lines = []
    for ours in results:
        for theirs in results:
            comparable = all(ours[key] == theirs[key] for key in ("shape", "mode", "length"))
            if not comparable or (ours["who"], theirs["who"]) != ("sft_jax", "trl"):
                continue
            if "error" in ours["run"] or "error" in theirs["run"]:
                continue
            lines.append(
                f"{ours['shape']} {ours['mode']} {ours['length']:,}: {_side(ours)} / {_side(theirs)}: "
                f"{ours['tokens_per_second'] / theirs['tokens_per_second']:.2f} × the real tokens/s, "
                f"{_peak(ours) / _peak(theirs):.2f} × the peak memory"
            )
    return lines


class Server:
    """A process with all imports of a side done, which runs one case after another."""

    def __init__(self, who: str, scratch: Path):
        self._who, self._log = who, scratch / f"{who}.log"
        self._start()

    def _start(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, sys.argv[0], "serve-train", self._who],
                env=ENVIRONMENT | os.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(self._process, self._lines), daemon=True)
        self._reader.start()

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def __call__(self, what: str, options: dict[str, Any]) -> dict[str, Any]:
        """Returns the result of a runner; ``{"error": …}`` if it fails or exceeds :data:`CASE_SECONDS`."""
        assert self._process.stdin is not None
        deadline = time.monotonic() + CASE_SECONDS
        try:
            print(json.dumps([what, options]), file=self._process.stdin, flush=True)
            while True:
                line = self._lines.get(timeout=max(0.1, deadline - time.monotonic()))
                if line is None:
                    break
                if line.startswith(RESULT):
                    return json.loads(line.removeprefix(RESULT))
            log = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["process ended"]
            error = log[-1][:200]
        except queue.Empty:
            error = f"took longer than {CASE_SECONDS} s"
        except BrokenPipeError:
            error = "process ended"
        self.close()
        self._start()
        return {"error": error}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
