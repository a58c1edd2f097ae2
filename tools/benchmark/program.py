"""Sums the cycles that the TPU compiler estimates, of any program whose optimized HLO text is in a file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="optimized HLO, from ahead --keep-text or --xla_dump_to")
    parser.add_argument("--chip", default="v5e", help="the chip that the program was compiled for")
    parser.add_argument(
        "--trips", type=float, default=1.0, help="iterations of loops whose number depends on the data; default 1"
    )
    parser.add_argument("--model-flops", type=float, metavar="F", help="of a step on one chip, for the bound on MFU")
    parser.add_argument("--profile", action="store_true", help="list the source lines above their peak")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=bench_cycles)


def bench_cycles(options: argparse.Namespace) -> None:
    from sft_jax.planning.chips import CHIPS
    from sft_jax.planning.compiled_time import compiled_figures, compiled_text
    from sft_jax.planning.hlo import parse

    try:
        program = parse(options.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{options.file}: {error}") from error
    chip = CHIPS[options.chip]
    figures = compiled_figures(program, chip, lambda _: options.trips, options.model_flops, options.profile)
    print(json.dumps(figures) if options.json else "\n".join(compiled_text(figures)))
