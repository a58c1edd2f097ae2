"""Benchmarks of speed and memory, also against TRL: the sides alternate in one run, and ratios are of medians.

    python tools/bench.py train --rows gsm8k/train.jsonl --shape 50m --mode lora
    python tools/bench.py data --rows train.jsonl --tokenizer FOLDER --template chat.jinja --copies 20 --processes 2

``train``: trains a model of a given shape on conversations with this library and with TRL and PEFT, each in separate
processes, and measures the rate of matrix products on the same device (the accelerator, or the CPU).
``start``: the time to the first step of a run, in a first start and in one that finds compiled programs on disk.
``grid``: training for several shapes, methods, precisions and loads on a GPU, as far as the time goes; a second run
continues. Published figures of others and the goals stand beside. ``--tiny`` tests all of it on a CPU.
``attention``: the attention backends of this device, against the reference and against each other.
``loss``: the fused ``lm_head`` and loss against the plain formula, in time and memory.
``quantized``: products with nf4 and int8 weights by Pallas kernels, against dequantizing the weight first, on a GPU.
``ahead``: the train step of a shape, compiled ahead of time for any topology, as in ``sft-jax plan``.
``cycles``: the cycles that the TPU compiler estimates for a program, from its text, such as ``ahead --keep-text``'s.
``depth``: the host's cost of more layers: tracing, compiling and dispatching a step.
``host``: the host memory to load and export a model, in one and in several processes.
``data``: tokenizing conversations and computing loss masks, against TRL with the same rows and number of processes.
Rows with ``question`` and ``answer`` are first written as conversations, ``--copies`` times.
``plan``: packing a million examples.
``lint``: looking for duplicates, leaks, broken answers and secrets in a million random examples.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))

from benchmark import ahead, attention, data, depth, grid, host, lint, loss, program, quantized, runners, start, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    train.add_arguments(commands.add_parser("train"))
    start.add_arguments(commands.add_parser("start"))
    grid.add_arguments(commands.add_parser("grid"))
    attention.add_arguments(commands.add_parser("attention"))
    loss.add_arguments(commands.add_parser("loss"))
    quantized.add_arguments(commands.add_parser("quantized"))
    ahead.add_arguments(commands.add_parser("ahead"))
    program.add_arguments(commands.add_parser("cycles"))
    depth.add_arguments(commands.add_parser("depth"))
    host.add_arguments(commands.add_parser("host"))
    data.add_arguments(commands.add_parser("data"))
    lint.add_arguments(commands.add_parser("lint"))
    plan = commands.add_parser("plan")
    plan.add_argument("--rows", type=int, default=1_000_000)
    plan.set_defaults(run=data.bench_plan)
    one = commands.add_parser("one-train")
    one.add_argument("who", choices=runners.RUNNERS)
    one.add_argument("options")
    one.set_defaults(run=lambda options: runners.run_one(options.who, options.options))
    one = commands.add_parser("serve-train")
    one.add_argument("who", choices=("sft_jax", "trl"))
    one.set_defaults(run=lambda options: runners.serve(options.who))
    one = commands.add_parser("one-data")
    one.add_argument("who", choices=data.PREPARE)
    one.add_argument("file")
    one.add_argument("tokenizer")
    one.add_argument("template")
    one.add_argument("processes", type=int)
    one.set_defaults(run=data.one_data)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
