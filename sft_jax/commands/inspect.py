"""``sft-jax inspect``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from sft_jax.commands.shared import add_config, config_of, quiet_imports
from sft_jax.errors import UserError


def add(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "inspect", help="show what will be trained: rows with their mask, counts, what is refused"
    )
    add_config(parser, "data.max_length=4096")
    parser.add_argument("--rows", type=int, metavar="N", help="examples to show; default 3, with --json all")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: the summary, then an example each")
    parser.add_argument("--html", metavar="FILE", help="also write a page")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Read the data, and print."""
    config = config_of(options)
    if options.rows is not None and options.rows < 0:
        raise UserError(f"--rows: {options.rows} is negative")
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed, and no accelerator taken from a run beside it
    quiet_imports()
    from sft_jax.run.inspect import inspect

    inspect(config, options.rows, options.json, options.html)
    return 0
