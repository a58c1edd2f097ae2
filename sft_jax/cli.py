"""The command line. Each command imports what it needs when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import os
import sys

from sft_jax import __version__
from sft_jax.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 on success, 2 on a mistake of the user's, told in one line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.command(options)
    except UserError as error:
        print(f"sft-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sft-jax: interrupted", file=sys.stderr)
        return 130


def _train(options: argparse.Namespace) -> int:
    from sft_jax.config import load

    config = load(options.config, options.overrides)
    _quiet_imports()
    from sft_jax.train import train

    train(config)
    return 0


def _export(options: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # an export needs no accelerator and takes none from a run beside it
    _quiet_imports()
    from sft_jax.export import export

    export(options.run, options.out, options.format, options.step)
    return 0


def _quiet_imports() -> None:
    """Hints of transformers about optional packages are not ours to print."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sft-jax", description="Supervised fine-tuning of language models in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"sft-jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train; continues where a run of the same config left off")
    train.add_argument("config", metavar="CONFIG.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.learning_rate=2e-5")
    train.set_defaults(command=_train)

    export = commands.add_parser("export", help="write a run as a PEFT adapter or a Hugging Face model")
    export.add_argument("run", metavar="RUN", help="the run folder (training.output_dir)")
    export.add_argument("out", metavar="OUT", help="a folder that does not exist yet or is empty")
    export.add_argument(
        "--format", choices=("adapter", "merged"), help="default: adapter for LoRA, merged for full fine-tuning"
    )
    export.add_argument("--step", type=int, help="default: the last checkpoint")
    export.set_defaults(command=_export)
    return parser
