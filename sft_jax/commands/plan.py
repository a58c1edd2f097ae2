"""``sft-jax plan``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from sft_jax.commands.shared import add_config, config_of, quiet_imports
from sft_jax.config import Config
from sft_jax.errors import UserError


def add(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser(
        "plan", help="compile the train step ahead of time for a TPU slice or GPUs: does it fit?"
    )
    add_config(parser, "training.batch_size=32")
    parser.add_argument(
        "--topology",
        metavar="CHIP:SHAPE",
        help="such as v5e:4x4, v5p:64, h100:8, h100:2x8; default: that of the recipe, or this machine",
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
    parser.add_argument(
        "--profile", action="store_true", help="list the source lines that take more cycles than at peak, on TPUs"
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
    from sft_jax.planning.this_machine import this_machine

    topology, known = _of_recipe(options.config, config)
    assumed = Assumptions(options.target_share, options.document_length)
    topology, file = options.topology or topology, options.architecture or known
    if topology is None:
        topology = this_machine()
        if topology is None:
            raise UserError(
                "--topology: is missing, and this machine has no accelerator that plan knows; name the hardware, such "
                "as v5e:4x4 (16 chips) or h100:8"
            )
        print(f"--topology {topology}: this machine", file=sys.stderr)
    plan(config, topology, file, assumed, options.json, options.advice, options.search, options.profile)
    return 0


def _of_recipe(name: str, config: Config) -> tuple[str | None, Path | None]:
    """The topology of a built-in recipe, and the built-in ``config.json`` of its model, which may be gated."""
    from sft_jax.builtin import PREFIX, architecture
    from sft_jax.builtin import config as locate
    from sft_jax.builtin.recipes import recipes

    recipe = next((one for one in recipes() if name.startswith(PREFIX) and one.path == locate(name)), None)
    if recipe is None:
        return None, None
    file = architecture(recipe.model) if config.model.path == recipe.model else None
    if file is not None:
        print(
            f"{recipe.model}: its config.json comes with this package; --architecture FILE names another",
            file=sys.stderr,
        )
    return recipe.topology, file
