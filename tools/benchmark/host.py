"""Measures the host memory to load and export a model, in one process and in several."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmark.kit import SHAPES, make_model

ROW = {"question": "What is one and one?", "answer": "Two."}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--mode", choices=("lora", "full"), default="lora")
    parser.add_argument("--shape", choices=SHAPES, default="2b", help="2b: 4.1 GB")
    parser.add_argument("--folder", type=Path, help="folder to create and keep the model in; default: a temporary one")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=bench_host)


def bench_host(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        base = folder / f"base-{options.shape}"
        if not base.is_dir():
            # In another process: the peak that the system reports for a child starts at its parent's peak.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                pool.submit(make_model, base, options.shape, "bfloat16", list(ROW.values()), 10**9).result()
        rows = []
        for count in options.processes:
            with tempfile.TemporaryDirectory(dir=folder) as runs:  # on the same disk, which has space for a model
                rows.append(measure(Path(runs), base, count, options.mode))
    if options.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(
            f"{row['processes']} process(es), weights {row['weight_bytes'] / 1e9:.2f} GB: peak of each process "
            f"{_gigabytes(row['load_bytes'])} GB loading and {_gigabytes(row['export_bytes'])} GB exporting; "
            f"{row['nothing_bytes'] / 1e9:.2f} GB without a model; "
            f"{'byte-equal' if row['byte_equal'] else 'NOT byte-equal'}"
        )


def measure(folder: Path, base: Path, count: int, mode: str) -> dict[str, Any]:
    """Measures a run of zero steps and its merged export."""
    (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    run, out = folder / f"run-{mode}-{count}", folder / f"out-{mode}-{count}"
    keys = [
        f"model.path={base}", f"data.train=[{{path: {folder / 'rows.jsonl'}}}]", f"training.output_dir={run}",
        "training.max_steps=0", "training.tensorboard=false", "data.max_length=64", "training.batch_size=4",
    ]  # fmt: skip
    if mode == "full":
        keys += ["lora=null", "model.param_dtype=bfloat16", "optimizer.moments=factored"]
    config = folder / "config.yaml"
    config.write_text("{}\n", encoding="utf-8")
    loading = peaks(["train", str(config), *keys], count)
    exporting = peaks(["export", str(run), str(out), "--format", "merged"], count)
    return {
        "processes": count,
        "mode": mode,
        "weight_bytes": sum(file.stat().st_size for file in base.glob("*.safetensors")),
        "nothing_bytes": peaks(["export", str(folder / "none"), str(out)], 1, expected=2)[0],
        "load_bytes": loading,
        "export_bytes": exporting,
        "byte_equal": same_tensors(base, out),
    }


def peaks(arguments: list[str], count: int, expected: int = 0) -> list[int]:
    """Runs a command in ``count`` processes and returns the peak resident memory of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results: list[tuple[int, int]] = [(0, 0)] * count

    def run(i: int) -> None:
        distributed = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count), "--process-id", str(i)]
        process = subprocess.Popen(
            [sys.executable, "-m", "sft_jax", *arguments, *(distributed if count > 1 else [])],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        errors = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != expected:
            print(errors, file=sys.stderr)
        results[i] = (process.returncode, usage.ru_maxrss * 1024)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if any(code != expected for code, _ in results):
        sys.exit(f"bench: sft-jax {arguments[0]} failed")
    return [peak for _, peak in results]


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two folders have byte-equal tensors."""
    from sft_jax.hf.reader import TensorReader, chunks

    a, b = TensorReader(one), TensorReader(other)
    return a.names == b.names and all(
        a.dtype(name) == b.dtype(name)
        and a.shape(name) == b.shape(name)
        and all(rows.tobytes() == b.read(name, at, at + len(rows)).tobytes() for at, rows in chunks(a, name))
        for name in a.names
    )


def _gigabytes(sizes: list[int]) -> str:
    return " and ".join(f"{size / 1e9:.2f}" for size in sizes)
