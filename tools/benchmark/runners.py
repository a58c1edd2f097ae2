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

from benchmark.timing import median_seconds


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
        train(_config(options, out))
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


def _config(options: dict[str, Any], out: str) -> Any:
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
        ),
        lora=LoraConfig(rank=16, alpha=32.0) if options["mode"] == "lora" else None,
        data=DataConfig(train=[SourceConfig(path=f"{options['kit']}/train.jsonl")], max_length=options["row_length"]),
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


def run_trl(options: dict[str, Any]) -> dict[str, Any]:
    """Trains on the same conversations in file order with TRL's ``SFTTrainer`` and PEFT."""
    import torch  # pyright: ignore[reportMissingImports]
    from datasets import load_dataset
    from peft import LoraConfig  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.sft_trainer import SFTTrainer  # pyright: ignore[reportMissingImports]

    steps, warmup, per_step = options["steps"], options["warmup"], options["conversations"]
    on_gpu = torch.cuda.is_available()
    attention = _fastest_attention() if on_gpu else "sdpa"
    tokenizer = AutoTokenizer.from_pretrained(options["kit"])
    model = AutoModelForCausalLM.from_pretrained(
        options["kit"],
        dtype=getattr(torch, options["dtype"]),
        attn_implementation=attention,
    )
    packs = attention != "sdpa"  # without a segment-aware kernel, packing attends over the whole sequence
    rows: Any = load_dataset("json", data_files=f"{options['kit']}/train.jsonl", split="train")
    times: list[float] = []
    began: list[float] = []
    seen: list[tuple[int, int, int]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            began.append(time.time())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.time() - began[-1])

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=model,
            args=_trl_arguments(options, out, packs, on_gpu),
            train_dataset=rows if packs else rows.select(range(per_step * (warmup + steps))),
            processing_class=tokenizer,
            peft_config=lora if options["mode"] == "lora" else None,
            callbacks=[Clock()],
        )
        collate: Any = trainer.data_collator

        def counting(examples: Any) -> Any:
            batch = collate(examples)
            total = batch["input_ids"].numel()
            real = int(batch["attention_mask"].sum()) if "attention_mask" in batch else total
            seen.append((real, int((batch["labels"] != -100).sum()), total))
            return batch

        trainer.data_collator = counting
        trainer.train()
    measured = seen[warmup : warmup + steps]
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "step_seconds": times[warmup:],
        "real_tokens": [real for real, _, _ in measured],
        "target_tokens": [targets for _, targets, _ in measured],
        "all_tokens": [total for _, _, total in measured],
        "first_step_at": began[0] + times[0],
        "attention": attention,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "device_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _trl_arguments(options: dict[str, Any], out: str, packs: bool, on_gpu: bool) -> Any:
    """Returns the ``SFTConfig`` of a measured run."""
    from trl.trainer.sft_config import SFTConfig  # pyright: ignore[reportMissingImports]

    return SFTConfig(
        output_dir=out,
        per_device_train_batch_size=options["batch_size"] if packs else options["conversations"],
        max_steps=options["warmup"] + options["steps"],
        logging_steps=1,
        report_to="none",
        bf16=on_gpu and options["dtype"] == "bfloat16",
        use_cpu=not on_gpu,
        max_length=options["row_length"],
        assistant_only_loss=True,
        gradient_checkpointing=options["checkpointing"],
        packing=packs,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )


def _fastest_attention() -> str:
    """Returns FlashAttention 2 for packed sequences, from its package or from PyTorch, and otherwise ``sdpa``."""
    from transformers import AttentionInterface
    from transformers.utils.import_utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        return "flash_attention_2"
    try:
        from torch.nn.attention.varlen import varlen_attn  # type: ignore[import-not-found]
    except ImportError:
        return "sdpa"

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float | None = None, **kwargs: Any) -> Any:
        q, k, v = (x.transpose(1, 2)[0] for x in (q, k, v))  # [1, heads, tokens, H]: TRL concatenates the sequences
        starts, longest = kwargs["cu_seq_lens_q"], int(kwargs["max_length_q"])
        out: Any = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0))
        return out[None], None

    AttentionInterface.register("torch_varlen", attend)
    return "torch_varlen"


def run_device(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the platform of the measurements."""
    import jax

    return {"platform": jax.default_backend()}


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
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
