"""``sft-jax score``: prints one line per response; a star marks the most likely response of each row."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from sft_jax.commands.shared import add_model, quiet_imports


def add(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser("score", help="compute log-likelihoods of responses")
    add_model(parser)
    parser.add_argument("file", metavar="FILE.jsonl", help="rows of 'prompt' and 'responses' (or chosen and rejected)")
    parser.add_argument("--raw", action="store_true", help="plain text, without the chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object per response")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Score the responses and print their log-likelihoods."""
    quiet_imports()
    from sft_jax.assembly import open_model
    from sft_jax.data.read.lines import read_json_lines
    from sft_jax.evaluation.score import score

    rows = read_json_lines(Path(options.file))
    model = open_model(options.model, options.base, options.step, options.dtype)
    print(model.description, file=sys.stderr)
    scores = score(model, rows, options.raw, options.file)
    if options.json:
        for one in scores:
            row = {"row": one.row, "candidate": one.candidate}
            print(json.dumps(row | {"log_likelihood": one.log_likelihood, "num_tokens": one.num_tokens}))
        return 0
    best: dict[int, float] = {}
    for one in scores:
        best[one.row] = max(best.get(one.row, -math.inf), one.log_likelihood)
    print(f"{'row':>5} {'cand.':>5} {'log-likelihood':>15} {'tokens':>7} {'per token':>10}  response")
    for one in scores:
        star = "*" if one.log_likelihood == best[one.row] else " "
        text = one.response if len(one.response) <= 60 else f"{one.response[:60]} …"
        print(
            f"{one.row:>5} {one.candidate:>5} {one.log_likelihood:>15.4f} {one.num_tokens:>7} {one.per_token:>10.4f} "
            f"{star} {text!r}"
        )
    return 0
