"""``sft-jax export``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from sft_jax.commands.shared import add_processes, add_step, quiet_imports
from sft_jax.without_torch import bring_back_torch


def add(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser("export", help="export a run as a PEFT adapter or a Hugging Face model")
    parser.add_argument("run", metavar="RUN", help="the run directory (training.output_dir)")
    parser.add_argument("out", metavar="OUT", help="a new or empty folder, or gs://…")
    parser.add_argument(
        "--format", choices=("adapter", "merged"), help="default: adapter for LoRA, merged for full fine-tuning"
    )
    add_step(parser)
    parser.add_argument("--base", help="the base model, if it has moved")
    parser.add_argument(
        "--check",
        action="store_true",
        help="load what was written again and compare it with the run; exit code 1 if they differ",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of a merged model; default: as in the base's files"
    )
    parser.add_argument(
        "--push",
        metavar="USER/REPO[@BRANCH]",
        help="upload to the Hugging Face Hub; run the same command again to resume an upload",
    )
    parser.add_argument("--public", action="store_true", help="a new repository of --push is public, not private")
    add_processes(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Export the run."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # leaves the accelerators to training
    if options.check:
        bring_back_torch()
    quiet_imports()
    from sft_jax.distributed.processes import joined

    with joined(options.coordinator, options.num_processes, options.process_id, options.timeout):
        from sft_jax.api import export

        export(
            options.run, options.out, options.format, options.step, options.base, options.check,
            options.dtype, options.push, options.public,
        )  # fmt: skip
    return 0
