"""``sft-jax check``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from sft_jax.commands.shared import add_step, quiet_imports
from sft_jax.without_torch import bring_back_torch


def add(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser(
        "check", help="prove that a model is imported right: tensors, bytes, logits, text, stop token"
    )
    parser.add_argument(
        "model", metavar="MODEL", help="builtin:tiny, a Hugging Face folder or id, a run directory, or an adapter"
    )
    parser.add_argument("--base", help="the base model of a run or an adapter, if it has moved")
    add_step(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Check the model. Returns 1 if something failed."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # float32 on accelerators is not what it is on a CPU
    bring_back_torch()
    quiet_imports()
    from sft_jax.run.check import check

    return 0 if check(options.model, options.base, options.step, options.json)["passed"] else 1
