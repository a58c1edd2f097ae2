"""Entry point of ``sft-jax`` and ``python -m sft_jax``."""

import sys

from sft_jax.cli import main
from sft_jax.without_torch import leave_out_torch


def run() -> int:
    """Run a command in a process of its own; :func:`sft_jax.cli.main` also runs inside other programs."""
    leave_out_torch()
    return main()


if __name__ == "__main__":
    sys.exit(run())
