"""``sft-jax inspect``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from sft_jax.commands.shared import add_config, config_of, quiet_imports
from sft_jax.errors import UserError


def add(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser(
        "inspect", help="show the training data: examples with their loss mask, counts, errors"
    )
    add_config(parser, "data.max_length=4096")
    parser.add_argument("--rows", type=int, metavar="N", help="examples to show; default 3, with --json all")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per line: the summary, then the examples"
    )
    parser.add_argument(
        "--lint",
        action="store_true",
        help="also look for duplicates, leaks of held-out data, empty and cut-off answers, outliers, secrets",
    )
    parser.add_argument("--html", metavar="FILE", help="also write an HTML page")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Read the data and print the report."""
    config = config_of(options)
    if options.rows is not None and options.rows < 0:
        raise UserError(f"--rows: {options.rows} is negative")
    os.environ["JAX_PLATFORMS"] = "cpu"  # leaves the accelerators to training
    quiet_imports()
    from sft_jax.run.inspect import inspect

    inspect(config, options.rows, options.json, options.html, options.lint)
    return 0
