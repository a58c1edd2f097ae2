"""``sft-jax evaluate``."""

from __future__ import annotations

import argparse
from typing import Any

from sft_jax.commands.shared import add_config, add_step, config_of, quiet_imports


def add(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser("evaluate", help="compare the base and the tuned model of a run on held-out data")
    add_config(parser, "evaluation.shots=4")
    add_step(parser)
    parser.add_argument("--base", help="the base model, if it has moved")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Evaluate the run and print the results."""
    config = config_of(options)
    quiet_imports()
    from sft_jax.run.evaluate import evaluate

    evaluate(config, options.step, options.json, base=options.base)
    return 0
