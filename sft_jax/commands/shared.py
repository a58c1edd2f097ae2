"""What several commands have in common."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sft_jax.config import Config


def add_config(parser: argparse.ArgumentParser, example: str, config_help: str | None = None) -> None:
    """A config and overrides; read them with :func:`config_of`."""
    parser.add_argument("config", metavar="CONFIG.yaml", help=config_help)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"such as {example}")


def config_of(options: argparse.Namespace) -> Config:
    """The config that :func:`add_config` asked for."""
    from sft_jax.config_file import load

    return load(options.config, options.overrides)


def add_model(parser: argparse.ArgumentParser) -> None:
    """A model, by what people call it."""
    parser.add_argument(
        "model",
        metavar="MODEL_OR_RUN",
        help="builtin:tiny, a Hugging Face folder or id, a run directory, an adapter",
    )
    parser.add_argument("--base", help="the base model of a run or an adapter, where it has moved")
    parser.add_argument("--step", type=int, help="of a run; default: the last checkpoint")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the run's, or that of the files")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """How several processes find each other."""
    group = parser.add_argument_group("several processes", "found by themselves on Cloud TPU, SLURM and Open MPI 4")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, with a port that is free there")
    group.add_argument("--num-processes", type=int, metavar="N", help="1: this one alone, whatever is around it")
    group.add_argument("--process-id", type=int, metavar="I", help="of this one, from 0")
    group.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="of silence after which one is taken to be gone",
    )


def quiet_imports() -> None:
    """Hints of transformers about optional packages are not ours to print."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
