"""The process of a command: ``sft-jax``, or ``python -m sft_jax``."""

import sys

from sft_jax.cli import main
from sft_jax.without_torch import leave_out_torch


def run() -> int:
    """A command, in a process that is there for nothing else; :func:`sft_jax.cli.main` may share it with others."""
    leave_out_torch()
    return main()


if __name__ == "__main__":
    sys.exit(run())
