"""Runs ``sft-jax plan`` for all recipes and writes the results to their headers and to configs/PLANS.md.

    python tools/plan_recipes.py [--only WORD …] [--again]

Rewrites the line ``# plan TOPOLOGY: …`` at the end of a recipe's header. configs/PLANS.md has a table of a few models
on several topologies, with one sequence of 2,048 tokens per chip, and a table of the headers. Existing results are kept
unless ``--again`` is given. Each plan runs in its own process. Model configs come from configs/architectures/; nothing
is downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from sft_jax.builtin import architecture
from sft_jax.builtin.recipes import Recipe, recipes, with_plan

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
PLANS = CONFIGS / "PLANS.md"
NOT_MEASURED = "not measured"

# Rows of the table: name -> recipe.
MODELS = {
    "Llama-3.1-8B LoRA": "llama-3.1-8b-lora-v5e-16",
    "Llama-3.1-8B full": "llama-3.1-8b-full-v5e-16",
    "Qwen2.5-32B LoRA": "qwen2.5-32b-lora-v5e-16",
    "Llama-3.1-70B LoRA": "llama-3.1-70b-lora-v5p-64",
    "Llama-3.1-70B QLoRA": "llama-3.1-70b-qlora-v5e-16",
}
TOPOLOGIES = {"v5e:4x4": 16, "v5e:16x16": 256, "v5p:4x4x4": 64, "v6e:8x8": 64, "h100:8": 8}
COLUMNS = (
    "model",
    "topology",
    "fits",
    "peak, MiB a chip",
    "of",
    "remat",
    "no faster than",
    "bound",
    "compiler estimates",
    "compiled in, CPU",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="words of recipe, model or topology")
    parser.add_argument("--again", action="store_true", help="replace existing results")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds per plan")
    options = parser.parse_args()

    def selected(*names: str) -> bool:
        return not options.only or any(word in name for word in options.only for name in names)

    for recipe in recipes():
        if selected(recipe.name, recipe.topology) and (options.again or recipe.plan == NOT_MEASURED):
            plan = run_plan(recipe, recipe.topology, [], options.timeout)
            if plan is not None:
                text = with_plan(recipe.path.read_text(encoding="utf-8"), as_line(plan))
                recipe.path.write_text(text, encoding="utf-8")
    by_name = {recipe.name: recipe for recipe in recipes()}
    for topology in TOPOLOGIES:
        for model, recipe in MODELS.items():
            rows = read_table()
            if selected(model, topology) and (options.again or rows[model, topology][2] == NOT_MEASURED):
                batch = TOPOLOGIES[topology]
                changes = [f"training.batch_size={batch}", "training.num_microbatches=1"]
                plan = run_plan(by_name[recipe], topology, changes, options.timeout)
                if plan is not None:
                    write_tables(rows | {(model, topology): as_row(model, topology, plan)})
    write_tables(read_table())


def run_plan(recipe: Recipe, topology: str, changes: list[str], timeout: float) -> dict[str, Any] | None:
    """Runs ``plan`` and returns its figures; prints the error and returns None if it fails."""
    command = [sys.executable, "-m", "sft_jax", "plan", str(recipe.path), *changes, "--topology", topology]
    command += ["--no-advice", "--json", "--architecture", str(architecture(recipe.model))]
    print(f"{recipe.name} {' '.join(changes)} on {topology} …", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False)
    except subprocess.TimeoutExpired:
        print(f"  took more than {timeout:.0f} s", file=sys.stderr, flush=True)
        return None
    if done.returncode:
        print(f"  failed ({done.returncode}): {done.stderr.strip()[-500:]}", file=sys.stderr, flush=True)
        return None
    plan = json.loads(done.stdout.splitlines()[-1])
    print(f"  {as_line(plan)}", file=sys.stderr, flush=True)
    return plan


def as_line(plan: dict[str, Any]) -> str:
    """Formats a plan as a line of a header."""
    estimate = _estimate(plan)
    speed = (
        f"no faster than {plan['roofline_step_seconds'] * 1e3:,.0f} ms a step ({plan['bound']}), "
        f"{plan['roofline_tokens_per_second']:,.0f} tokens/s; "
        f"{f'the compiler estimates {estimate}; ' if estimate else ''}"
        f"compiled in {plan['compile_cpu_seconds']:.0f} s of CPU time"
    )
    fits = "fits" if plan["fits"] else "does not fit"
    return f"{fits}, peak {_peak(plan)} of {_usable(plan)} MiB a chip, remat {plan['remat']}; {speed}"


def as_row(model: str, topology: str, plan: dict[str, Any]) -> tuple[str, ...]:
    """Formats a plan as a row of the table."""
    fits = "yes" if plan["fits"] else "no"
    seconds = f"{plan['roofline_step_seconds'] * 1e3:,.0f} ms"
    compiled = f"{plan['compile_cpu_seconds']:.0f} s"
    peak, usable, estimate = _peak(plan), _usable(plan), _estimate(plan) or "none"
    return model, topology, fits, peak, usable, plan["remat"], seconds, plan["bound"], estimate, compiled


def _estimate(plan: dict[str, Any]) -> str | None:
    """The compiler's estimate of a step with what waits for the network; None if it has none."""
    figures = plan["compiled"]
    if figures["cycles"] is None:
        return None
    return f"{(figures['seconds'] + figures['waiting_seconds']) * 1e3:,.0f} ms"


def _peak(plan: dict[str, Any]) -> str:
    return "unknown" if plan["peak_bytes"] is None else f"{plan['peak_bytes'] / 2**20:,.0f}"


def _usable(plan: dict[str, Any]) -> str:
    return f"{plan['usable_bytes'] / 2**20:,.0f}"


def read_table() -> dict[tuple[str, str], tuple[str, ...]]:
    """Reads the table of configs/PLANS.md and adds missing rows."""
    rows = {}
    for model in MODELS:
        for topology in TOPOLOGIES:
            rows[model, topology] = (model, topology, NOT_MEASURED, *[""] * (len(COLUMNS) - 3))
    if PLANS.is_file():
        for line in PLANS.read_text(encoding="utf-8").splitlines():
            cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
            if cells[:2] in rows and len(cells) == len(COLUMNS):
                rows[cells[0], cells[1]] = cells
    return rows


def write_tables(rows: dict[tuple[str, str], tuple[str, ...]]) -> None:
    """Writes configs/PLANS.md: the rows of the first table, and the headers of all recipes."""
    headers = [(f"[{one.name}](recipes/{one.path.name})", one.topology, one.plan) for one in recipes()]
    tables = (_table(COLUMNS, list(rows.values())), _table(("recipe", "topology", "plan"), headers))
    PLANS.write_text(_TEXT + tables[0] + _RECIPES + tables[1], encoding="utf-8")


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, ("---",) * len(columns), *rows))


_TEXT = """# What fits where

Written by `python tools/plan_recipes.py`: the train step, compiled ahead of time by `sft-jax plan`, with one sequence
of 2,048 tokens per chip and step, `remat: auto`, and weights and optimizer state sharded over all chips. LoRA has rank
16 on all linear layers of a bfloat16 base, QLoRA of an nf4 base; full fine-tuning keeps weights and moments in float32.
"of" is the memory of a chip that a process can use: on a TPU what the compiler offers, on a GPU three quarters (JAX's
default; workspaces of cuDNN are not counted). "no faster than" is a roofline from published peak rates, with half of
the tokens as targets and one document per sequence. "compiler estimates" is the TPU compiler's own time for the
step, with what waits for the network; where it is "not measured", the whole row comes from an earlier version. Neither
is a measurement of speed. Compile times are CPU time of all cores and include the rematerialization policies that did
not fit.

"""

_RECIPES = """
## Recipes

Each with its own batch on the hardware that it is written for; the same lines are in the headers of the recipes. Lines
for TPUs without an estimate of the compiler come from an earlier version.

"""

if __name__ == "__main__":
    main()
