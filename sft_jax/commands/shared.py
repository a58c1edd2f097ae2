"""Options and helpers that several commands share."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sft_jax.config import Config


def add_config(parser: argparse.ArgumentParser, example: str, config_help: str | None = None) -> None:
    """Add the options of a config and its overrides; read them with :func:`config_of`."""
    parser.add_argument("config", metavar="CONFIG.yaml", help=config_help)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"such as {example}")


def config_of(options: argparse.Namespace) -> Config:
    """Load the config that the options of :func:`add_config` name."""
    from sft_jax.config_file import load

    return load(options.config, options.overrides)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a model."""
    parser.add_argument(
        "model",
        metavar="MODEL_OR_RUN",
        help="builtin:tiny, a Hugging Face folder or id, a run directory, or an adapter",
    )
    parser.add_argument("--base", help="the base model of a run or an adapter, if it has moved")
    parser.add_argument("--step", type=int, help="a checkpoint of a run; default: the last")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="compute dtype; default: that of the run or of the files"
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add the options that connect several processes."""
    group = parser.add_argument_group("several processes", "detected automatically on Cloud TPU, SLURM and Open MPI 4")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="host of process 0 and a free port on it")
    group.add_argument("--num-processes", type=int, metavar="N", help="number of processes; 1 disables detection")
    group.add_argument("--process-id", type=int, metavar="I", help="index of this process, from 0")
    group.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="seconds without a heartbeat after which a process counts as lost; default 60",
    )


def quiet_imports() -> None:
    """Hide the hints of transformers about optional packages."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
