"""``sft-jax recipes``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from typing import Any

from sft_jax.builtin import PREFIX
from sft_jax.builtin.recipes import Recipe, recipes
from sft_jax.errors import UserError


def add(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser("recipes", help="list configs for models and hardware, with what plan said")
    parser.add_argument("words", nargs="*", metavar="WORD", help="only recipes with all of these, such as llama v5e")
    parser.add_argument("--json", action="store_true", help="print one JSON object per recipe")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print the recipes as a table."""
    found = [one for one in recipes() if all(word.lower() in _text(one) for word in options.words)]
    if not found:
        raise UserError(f"no recipe has {' and '.join(map(repr, options.words))}; sft-jax recipes lists all")
    if options.json:
        for one in found:
            print(json.dumps({"name": one.name, **dataclasses.asdict(one), "path": str(one.path)}))
        return 0
    rows = [("recipe", "hardware", "memory a chip", "tokens/s, at most"), *map(_row, found)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        f"\nMemory is of the compiled step; speed is a bound that plan computes, not a measurement. For example:\n"
        f"  sft-jax train {PREFIX}{found[0].name} data.train=train.jsonl\n"
        f"  sft-jax plan {PREFIX}{found[0].name}"
    )
    return 0


def _text(recipe: Recipe) -> str:
    return f"{recipe.name} {recipe.title} {recipe.model} {recipe.topology}".lower()


def _row(recipe: Recipe) -> tuple[str, str, str, str]:
    memory = re.search(r"peak ([\d,]+) of ([\d,]+) MiB", recipe.plan)
    speed = re.search(r"([\d,]+) tokens/s", recipe.plan)
    gib = [f"{int(size.replace(',', '')) / 1024:.1f}" for size in memory.groups()] if memory else []
    return (
        recipe.name,
        f"{recipe.topology} ({recipe.title.rpartition(', on ')[2]})",
        f"{gib[0]} of {gib[1]} GiB" if gib else recipe.plan,
        speed[1] if speed else "",
    )
