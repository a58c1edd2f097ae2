"""Benchmarks data preparation (token ids and loss masks) against TRL, and packing of a million examples."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", required=True, help="a .jsonl with question and answer")
    parser.add_argument("--tokenizer", required=True, help="a folder")
    parser.add_argument("--template", required=True, help="a Jinja file with {%% generation %%}")
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--distinct", action="store_true", help="make all answers distinct, so that no text repeats")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.set_defaults(run=bench_data)


def bench_data(options: argparse.Namespace) -> None:
    rows = [json.loads(line) for line in Path(options.rows).read_text(encoding="utf-8").split("\n") if line.strip()]
    results: dict[str, list[dict[str, float]]] = {"sft_jax": [], "trl": []}
    with tempfile.TemporaryDirectory() as name:
        small, large = Path(name) / "small.jsonl", Path(name) / "large.jsonl"
        for path, copies in ((small, 1), (large, options.copies)):
            with path.open("w", encoding="utf-8") as file:
                for copy in range(copies):
                    for row in rows:
                        question = f"({copy}) {row['question']}" if copy else row["question"]  # makes rows distinct
                        answer = f"({copy}) {row['answer']}" if copy and options.distinct else row["answer"]
                        messages = [("user", question), ("assistant", answer)]
                        print(json.dumps({"messages": [{"role": r, "content": c} for r, c in messages]}), file=file)
        common = [options.tokenizer, options.template, str(options.processes)]
        few = measure("sft_jax", [str(small), *common], name)
        show("sft_jax", len(rows), few)
        for i in range(options.rounds):
            for who in ("sft_jax", "trl") if i % 2 == 0 else ("trl", "sft_jax"):
                results[who].append(measure(who, [str(large), *common], name))
                show(who, len(rows) * options.copies, results[who][-1])
        again = measure("sft_jax-again", [str(large), *common], name)
        show("sft_jax, second start", len(rows) * options.copies, again)
    seconds = {who: statistics.median(one["seconds"] for one in ones) for who, ones in results.items()}
    print(f"\nTRL / sft_jax, medians of {options.rounds}: {seconds['trl'] / seconds['sft_jax']:.2f}")


def bench_plan(options: argparse.Namespace) -> None:
    """Packs one epoch of log-normal conversation lengths (median 148 tokens) into sequences of 2,048 tokens."""
    import numpy as np

    from sft_jax.data.batches.packing import plan_run

    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.6, options.rows).astype(np.int64), 8, 2048)
    began = time.perf_counter()
    plan = plan_run(lengths, 2048, 16, 1)
    seconds = time.perf_counter() - began
    filled = lengths.sum() / plan.num_tokens
    print(f"{options.rows:,} examples packed in {seconds:.2f} s, {filled:.2%} filled")


def measure(who: str, arguments: list[str], scratch: str) -> dict[str, float]:
    """Runs one measurement in its own process, with empty caches except for a second start."""
    with tempfile.TemporaryDirectory(dir=scratch) as caches:
        warm = f"{scratch}/warm"
        if who == "sft_jax-again":
            subprocess.run(command("sft_jax", arguments), env=os.environ | {"SFT_JAX_CACHE": warm}, check=True,
                           capture_output=True)  # fmt: skip
        environment = os.environ | {
            "SFT_JAX_CACHE": warm if who == "sft_jax-again" else f"{caches}/sft_jax",
            "HF_DATASETS_CACHE": f"{caches}/datasets",
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            command(who.removesuffix("-again"), arguments), env=environment, check=True, capture_output=True, text=True
        )
    return json.loads(done.stdout.splitlines()[-1])


def command(who: str, arguments: list[str]) -> list[str]:
    return [sys.executable, sys.argv[0], "one-data", who, *arguments]


def show(who: str, rows: int, one: dict[str, float]) -> None:
    print(
        f"{who:>22}  {rows:>9,} rows  {one['seconds']:8.2f} s  {rows / one['seconds']:>9,.0f} rows/s  peak "
        f"{one['peak_mb']:,.0f} MB, worker peak {one['worker_peak_mb']:,.0f} MB, {one['targets']:,} targets",
        flush=True,
    )


def one_data(options: argparse.Namespace) -> None:
    """Prepares the rows and prints time and memory as JSON."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    tokenizer.chat_template = Path(options.template).read_text(encoding="utf-8")
    seconds, targets = PREPARE[options.who](options.file, tokenizer, options.processes)
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"seconds": seconds, "targets": targets, "peak_mb": peaks[0], "worker_peak_mb": peaks[1]}))


def prepare_sft_jax(file: str, tokenizer: Any, processes: int) -> tuple[float, int]:
    from sft_jax.config import SourceConfig
    from sft_jax.data.chat.encoder import Encoder
    from sft_jax.data.read.sources import open_sources
    from sft_jax.data.tokens.examples import encode_sources

    began = time.perf_counter()
    sources = open_sources([SourceConfig(path=file)])
    _, report = encode_sources(sources, Encoder(tokenizer), 2048, num_workers=processes, cache=True)
    return time.perf_counter() - began, report.total("targets")


def prepare_trl(file: str, tokenizer: Any, processes: int) -> tuple[float, int]:
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.sft_config import SFTConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.sft_trainer import SFTTrainer  # pyright: ignore[reportMissingImports]

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_length=2048, assistant_only_loss=True, dataset_num_proc=processes,
        report_to="none", use_cpu=True, bf16=False,
    )  # fmt: skip
    began = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=file, split="train")
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    seconds = time.perf_counter() - began
    prepared: Any = trainer.train_dataset
    batches = prepared.select_columns("labels").with_format("numpy").iter(batch_size=1000)
    return seconds, sum(int((labels[1:] != -100).sum()) for batch in batches for labels in batch["labels"])


PREPARE = {"sft_jax": prepare_sft_jax, "trl": prepare_trl}
