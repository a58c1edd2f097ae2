"""``sft-jax init``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from sft_jax.commands.shared import quiet_imports


def add(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser("init", help="write a config for your model and data")
    parser.add_argument(
        "--model", required=True, metavar="ID_OR_FOLDER", help="a Hugging Face id or folder, or builtin:tiny"
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="a file, a folder, a glob, a URL or a dataset id")
    parser.add_argument("--eval", metavar="FILE", help="held-out data")
    method = parser.add_mutually_exclusive_group()
    method.add_argument("--full", dest="method", action="store_const", const="full", help="full fine-tuning")
    method.add_argument("--qlora", dest="method", action="store_const", const="qlora", help="LoRA on a base in 4 bits")
    parser.add_argument(
        "--hardware", metavar="CHIP-COUNT", help="compile for it: v5e-8, h100:8, rtx-4090:1; default: this machine"
    )
    parser.add_argument("--out", default="", metavar="FILE", help="default: the name of the data, such as train.yaml")
    parser.set_defaults(command=run, method="lora")


def run(options: argparse.Namespace) -> int:
    """Write the config and print the reasons."""
    if options.hardware is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"  # the step is compiled for other machines and not run here
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    quiet_imports()
    from sft_jax.run.init import init

    init(options.model, options.data, options.eval, options.method, options.hardware, options.out)
    return 0
