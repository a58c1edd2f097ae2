"""``sft-jax plan``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from sft_jax.commands.shared import add_config, config_of, quiet_imports


def add(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser(
        "plan", help="compile the train step ahead of time for a TPU slice or GPUs: does it fit?"
    )
    add_config(parser, "training.batch_size=32")
    parser.add_argument(
        "--topology", required=True, metavar="CHIP:SHAPE", help="such as v5e:4x4, v5p:64, h100:8, h100:2x8"
    )
    parser.add_argument("--architecture", metavar="FILE", help="a config.json to use instead of the model's")
    parser.add_argument(
        "--target-share", type=float, default=0.5, metavar="X", help="fraction of supervised tokens; default 0.5"
    )
    parser.add_argument(
        "--document-length", type=int, metavar="N", help="tokens of an example; default: the sequence length"
    )
    parser.add_argument(
        "--no-advice", dest="advice", action="store_false", help="do not search for changes that make the step fit"
    )
    parser.add_argument(
        "--search", action="store_true", help="search for the fastest mesh, microbatches and remat that fit"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Compile the train step and print its memory and time."""
    config = config_of(options)
    os.environ["JAX_PLATFORMS"] = "cpu"  # the step is compiled for other machines and not run here
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides compiler warnings about programs that are too large
    quiet_imports()
    from sft_jax.planning.plan import Assumptions, plan

    assumed = Assumptions(options.target_share, options.document_length)
    plan(config, options.topology, options.architecture, assumed, options.json, options.advice, options.search)
    return 0
