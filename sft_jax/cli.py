"""The command line. Each command imports its dependencies when it runs, so that ``--help`` is fast."""

from __future__ import annotations

import argparse
import sys

from sft_jax import outside_faults
from sft_jax.commands import (
    check,
    evaluate,
    export,
    generate,
    init,
    inspect,
    plan,
    recipes,
    score,
    train,
    version,
    watch,
)
from sft_jax.config_names import SECTIONS, suggest_key
from sft_jax.errors import (
    BUG,
    USER_ERROR,
    CheckFailed,
    Preempted,
    Unreachable,
    UserError,
    exit_code,
    one_line,
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 on success, 1 if a check failed, 2 on a user error, 70 on any other error, 75 if running the command again
        resumes it, 130 if it was interrupted. Each error is one line on stderr.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse does not accept key=value after an option, but that is where users append overrides.
    accepts_overrides = hasattr(options, "overrides")
    if unknown := [one for one in rest if not accepts_overrides or one.startswith("-") or "=" not in one]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_hint(unknown[0]) if accepts_overrides else ''}")
    if rest:
        options.overrides += rest
    try:
        return options.command(options)
    except (UserError, CheckFailed, Preempted, Unreachable, KeyboardInterrupt) as error:
        print(f"sft-jax: {str(error) or 'interrupted'}", file=sys.stderr)
        return exit_code(error)
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of a library in Rust; not an Exception
        if options.debug or not (isinstance(error, Exception) or is_panic):
            raise
        line = outside_faults.explain(error, options.name)
        print(f"sft-jax: {one_line(line or outside_faults.unknown(error))}", file=sys.stderr)
        return BUG if line is None else USER_ERROR


def _hint(option: str) -> str:
    """The config key that an option of another tool stands for; empty if it is unknown."""
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    suggestion = f"use {SECTIONS[name]}=…" if name in SECTIONS else suggest_key(name)
    return f"; config keys are written key=value: {suggestion}" if suggestion else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sft-jax", description="Supervised fine-tuning of language models in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action=version.Version)
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for command in (init, train, watch, inspect, plan, recipes, evaluate, generate, score, check, export):
        command.add(commands)
    for one in commands.choices.values():
        one.add_argument("--debug", action="store_true", help="show the traceback of an error that is not a user error")
    return parser
