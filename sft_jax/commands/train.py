"""``sft-jax train``."""

from __future__ import annotations

import argparse
from typing import Any

from sft_jax.commands.shared import add_config, add_processes, config_of, quiet_imports


def add(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser("train", help="train; resumes a run of the same config")
    add_config(parser, "optimizer.learning_rate=2e-5")
    add_processes(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Train or resume a run."""
    config = config_of(options)
    quiet_imports()
    from sft_jax.distributed.processes import joined

    with joined(options.coordinator, options.num_processes, options.process_id, options.timeout):
        from sft_jax.api import train

        train(config)
    return 0
