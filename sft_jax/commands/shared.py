"""Options and helpers that several commands share."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sft_jax.config import Config


_BEGIN = (
    "sft-jax train builtin:quickstart trains an example, sft-jax init --model ID --data FILE writes a config for your "
    "model and data, sft-jax recipes lists configs by model and hardware"
)


def add_config(parser: argparse.ArgumentParser, example: str) -> None:
    """Add the options of a config and its overrides; read them with :func:`config_of`."""
    help = "a YAML file, a run directory, builtin:quickstart, or builtin:RECIPE (see sft-jax recipes)"
    parser.add_argument("config", nargs="?", metavar="CONFIG", help=help)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"such as {example}")


def config_of(options: argparse.Namespace) -> Config:
    """Load the config that the options of :func:`add_config` name.

    Raises:
        UserError: there is none; the message says how to begin.
    """
    from sft_jax.config_file import load
    from sft_jax.errors import UserError

    if options.config is None:
        raise UserError(f"{options.name} needs a config: {_BEGIN}")
    if "=" in options.config and not os.path.exists(options.config):
        raise UserError(f"{options.config}: the config comes before key=value: {_BEGIN}")
    return load(options.config, options.overrides)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a model."""
    parser.add_argument(
        "model",
        metavar="MODEL_OR_RUN",
        help="builtin:tiny, a Hugging Face folder or id, a run directory, or an adapter",
    )
    parser.add_argument("--base", help="the base model of a run or an adapter, if it has moved")
    add_step(parser)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="compute dtype; default: that of the run or of the files"
    )


def add_step(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses a checkpoint of a run."""
    parser.add_argument(
        "--step", type=_step, metavar="N|best|last", help="a checkpoint of a run; best: the lowest held-out loss"
    )


def _step(text: str) -> int | str:
    if text in ("best", "last"):
        return text
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor best or last") from error


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
