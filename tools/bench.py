"""Speed and memory, side by side with others in one run: who goes first alternates, ratios of medians are printed.

    python tools/bench.py train --rows gsm8k/train.jsonl --shape 50m --mode lora
    python tools/bench.py data --rows train.jsonl --tokenizer FOLDER --template chat.jinja --copies 20 --processes 2

``train``: a model of a given shape, trained on conversations by this library and by TRL with PEFT, each in processes of
its own, and against the rate of this machine's matrix products. On the accelerator that is there, or the CPU.
``grid``: the same for several shapes, methods and row lengths on a GPU, in minutes.
``attention``: the kernels that this device has, against the reference and against each other.
``loss``: the fused head and loss against the plain formula, in time and memory.
``ahead``: the train step of a shape compiled for hardware that need not be there, as ``sft-jax plan`` does.
``depth``: what more layers cost the host, in tracing, compiling and for each step.
``host``: how much memory a host needs to load and export a model, alone and as one of several processes.
``data``: conversations as ids and masks, against TRL's preparation of the same rows with as many processes. Questions
and answers (``question``, ``answer``) are written as conversations first, ``--copies`` times.
``plan``: which examples share a row, for a million of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))

from benchmark import ahead, attention, data, depth, grid, host, loss, runners, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    train.add_arguments(commands.add_parser("train"))
    grid.add_arguments(commands.add_parser("grid"))
    attention.add_arguments(commands.add_parser("attention"))
    loss.add_arguments(commands.add_parser("loss"))
    ahead.add_arguments(commands.add_parser("ahead"))
    depth.add_arguments(commands.add_parser("depth"))
    host.add_arguments(commands.add_parser("host"))
    data.add_arguments(commands.add_parser("data"))
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
