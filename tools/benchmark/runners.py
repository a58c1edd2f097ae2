"""Runs one side of a comparison in its own process: ``sft_jax``, TRL with PEFT, or plain matrix products.

The last line of the output is a JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from benchmark.kit import rows_of
from benchmark.timing import median_seconds
from benchmark.trl_side import NotAvailable, run_trl


def run_sft_jax(options: dict[str, Any]) -> dict[str, Any]:
    """Trains with :func:`sft_jax.run.train.train` like the command; times and token counts are from its metrics."""
    from sft_jax.without_torch import leave_out_torch

    leave_out_torch()

    import jax

    from sft_jax.run.announce import Announcer
    from sft_jax.run.train import train
    from sft_jax.store.checkpoint import Checkpoints
    from sft_jax.store.loggers.writer import MetricsWriter
    from sft_jax.store.metrics import read_metrics

    first_row: list[float] = []
    compiled: list[Any] = []
    backends: list[str] = []
    write, announce_compiled, announce_model = MetricsWriter.write, Announcer.compiled, Announcer.model

    def record_write(self: MetricsWriter, row: dict[str, Any]) -> None:
        first_row.append(time.time())
        write(self, row)

    def record_compiled(self: Announcer, step: Any) -> None:
        compiled.append(step)
        announce_compiled(self, step)

    def record_model(self: Announcer, *args: Any) -> None:
        backends.append(args[-1].backend.name)
        announce_model(self, *args)

    MetricsWriter.write, Announcer.compiled = record_write, record_compiled  # type: ignore[method-assign]
    Announcer.model = record_model  # type: ignore[method-assign]
    Checkpoints.save = lambda *_, **__: None  # type: ignore[method-assign]  # after the last step; tens of GB
    steps, warmup = options["steps"], options["warmup"]
    with tempfile.TemporaryDirectory() as out:
        train(config_of(options, out))
        rows = [row for row in read_metrics(Path(out) / "run" / "metrics.jsonl") if "loss" in row]
    measured = rows[warmup : warmup + steps]
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "losses": [row["loss"] for row in rows],
        "step_seconds": [row["step_seconds"] for row in measured],
        "real_tokens": [row["real_tokens"] for row in measured],
        "target_tokens": [row["target_tokens"] for row in measured],
        "all_tokens": [row["slot_tokens"] for row in measured],
        "first_step_at": first_row[0],
        "compile_seconds": sum(step.seconds for step in compiled),
        "remat": compiled[0].remat,
        "attention": backends[0],
        "device": jax.devices()[0].device_kind,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def config_of(options: dict[str, Any], out: str) -> Any:
    """Returns the config of a measured run."""
    from sft_jax.config import (
        Config,
        DataConfig,
        LoraConfig,
        ModelConfig,
        OptimizerConfig,
        SourceConfig,
        TrainingConfig,
    )

    return Config(
        model=ModelConfig(
            path=options["kit"],
            dtype=options["dtype"],
            remat=options["remat"],
            attention=options["attention"],
            quantization=options["quantization"],
            param_dtype=options["param_dtype"],
            **({"compute": options["compute"]} if options.get("compute") else {}),
        ),
        lora=LoraConfig(rank=16, alpha=32.0) if options["mode"] != "full" else None,
        data=DataConfig(train=[SourceConfig(path=rows_of(options))], max_length=options["row_length"]),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, schedule="constant", warmup_ratio=0.0, moments=options["moments"]
        ),
        training=TrainingConfig(
            output_dir=f"{out}/run",
            # One extra step: the run waits for the last step's metrics at once, which changes its time.
            max_steps=options["warmup"] + options["steps"] + 1,
            batch_size=options["batch_size"],
            eval_every=10**6,
            save_every=10**6,
            tensorboard=False,
        ),
    )


def run_device(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the platform of the measurements, the device and the bytes that a process can use of it."""
    import jax

    device = jax.devices()[0]
    usable = (device.memory_stats() or {}).get("bytes_limit")
    return {"platform": device.platform, "device": device.device_kind, "usable_bytes": usable}


def run_ceiling(options: dict[str, Any]) -> dict[str, Any]:
    """Measures the rate of matrix products in the benchmark's dtype in GFLOP/s: large square ones and the model's.

    The ceiling is the best median over shapes: the highest rate that either side could reach on this machine.
    """
    import jax
    import jax.numpy as jnp

    from sft_jax.hf.config import read_architecture

    arch = read_architecture(Path(options["kit"]))
    d, f, m = (
        arch.hidden_size,
        arch.layers[0].branches[1].spec.intermediate_size,
        options["batch_size"] * options["row_length"],
    )
    big = 2048 if jax.default_backend() == "cpu" else 8192
    shapes = [(big, big, big), (m, d, f), (m, f, d), (m, d, d)]
    rates = {}
    for rows, inner, columns in shapes:
        # Random numbers: a GPU lowers its clock with its power draw, and zeros and ones draw little power.
        x, y = (
            jax.random.normal(jax.random.key(i), size, options["dtype"])
            for i, size in enumerate([(rows, inner), (inner, columns)])
        )
        product = jax.jit(jnp.matmul).lower(x, y).compile()
        rates[f"{rows}×{inner}×{columns}"] = 2 * rows * inner * columns / median_seconds(product, (x, y)) / 1e9
    return {"gflops": max(rates.values()), "by_shape": rates, "device": jax.devices()[0].device_kind}


RUNNERS = {"sft_jax": run_sft_jax, "trl": run_trl, "device": run_device, "ceiling": run_ceiling}
RESULT = "RESULT "  # prefix of a line of :func:`serve` with a runner's result


def run_one(who: str, options: str) -> None:
    """Runs one side and prints its result as JSON."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(json.dumps(RUNNERS[who](json.loads(options))))


def serve(who: str) -> None:
    """Imports what a side needs, then runs each case from standard input and prints its result.

    Forks for each case of this library, since JAX cannot reset its peak memory statistics; torch can.
    """
    if who == "trl":
        import gc

        import peft  # noqa: F401 # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]
        import trl.trainer.sft_trainer  # noqa: F401 # pyright: ignore[reportMissingImports]

        for line in sys.stdin:
            result = _attempt(*json.loads(line))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            print(RESULT + json.dumps(result), flush=True)
        return
    from sft_jax.without_torch import leave_out_torch

    leave_out_torch()
    import sft_jax.run.train  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            print(RESULT + json.dumps(_attempt(*json.loads(line))), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(RESULT + json.dumps({"error": f"ended with status {status}"}), flush=True)


def _attempt(what: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the result of a runner, or its error, so that a case that does not fit does not stop the others."""
    try:
        return RUNNERS[what](options)
    except NotAvailable as error:
        return {"unavailable": str(error), "error": f"not available: {error}"}
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
