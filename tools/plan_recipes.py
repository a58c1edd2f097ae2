"""Compile recipes with ``sft-jax plan`` and write down what it says: in their headers and in configs/PLANS.md.

    python tools/plan_recipes.py [--only WORD …] [--again]

A recipe's header ends with a line ``# plan TOPOLOGY: …``, which is rewritten. The table in configs/PLANS.md has some
models on some topologies with one row of 2,048 a chip. What has a figure is left alone unless ``--again`` is given.
Each plan is a process of its own. Models are told by configs/architectures/, nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
PLANS = CONFIGS / "PLANS.md"
NOT_MEASURED = "not measured"
_PLAN_LINE = re.compile(r"^# plan (\S+): (.*)$", re.MULTILINE)

# The table: a name, the recipe it is made from.
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
    "compiled in, CPU",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="in the recipe's name, model or topology")
    parser.add_argument("--again", action="store_true", help="also what has a figure")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a plan")
    options = parser.parse_args()

    def wanted(*names: str) -> bool:
        return not options.only or any(word in name for word in options.only for name in names)

    for recipe in recipes():
        topology, said = header(recipe)
        if wanted(recipe.stem, topology) and (options.again or said == NOT_MEASURED):
            found = run_plan(recipe, topology, [], options.timeout)
            if found is not None:
                write_header(recipe, as_line(found))
    for topology in TOPOLOGIES:
        for model, recipe in MODELS.items():
            rows = read_table()
            if wanted(model, topology) and (options.again or rows[model, topology][2] == NOT_MEASURED):
                batch = TOPOLOGIES[topology]
                changes = [f"training.batch_size={batch}", "training.num_microbatches=1"]
                found = run_plan(CONFIGS / "recipes" / f"{recipe}.yaml", topology, changes, options.timeout)
                if found is not None:
                    write_table(rows | {(model, topology): as_row(model, topology, found)})


def recipes() -> list[Path]:
    """All of them."""
    return sorted((CONFIGS / "recipes").glob("*.yaml"))


def architecture_of(recipe: Path) -> Path:
    """The file with the hyperparameters of a recipe's model."""
    match = re.search(r"^  path: \S+/(\S+)$", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None, f"{recipe} names no model"
    return CONFIGS / "architectures" / f"{match[1].lower().replace('-instruct', '')}.json"


def header(recipe: Path) -> tuple[str, str]:
    """The topology of a recipe and what was found for it."""
    match = _PLAN_LINE.search(recipe.read_text(encoding="utf-8"))
    assert match is not None, f"{recipe} has no line '# plan TOPOLOGY: …'"
    return match[1], match[2]


def write_header(recipe: Path, line: str) -> None:
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(_PLAN_LINE.sub(lambda match: f"# plan {match[1]}: {line}", text, count=1), encoding="utf-8")


def run_plan(recipe: Path, topology: str, changes: list[str], timeout: float) -> dict[str, Any] | None:
    """What ``plan`` says; None if it failed, which is told."""
    command = [sys.executable, "-m", "sft_jax", "plan", str(recipe), *changes, "--topology", topology, "--no-advice"]
    command += ["--json", "--architecture", str(architecture_of(recipe))]
    print(f"{recipe.stem} {' '.join(changes)} on {topology} …", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False)
    except subprocess.TimeoutExpired:
        print(f"  took more than {timeout:.0f} s", file=sys.stderr, flush=True)
        return None
    if done.returncode:
        print(f"  failed ({done.returncode}): {done.stderr.strip()[-500:]}", file=sys.stderr, flush=True)
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"  {as_line(found)}", file=sys.stderr, flush=True)
    return found


def as_line(found: dict[str, Any]) -> str:
    """A plan in one line of a header."""
    speed = (
        f"no faster than {found['roofline_step_seconds'] * 1e3:,.0f} ms a step ({found['bound']}), "
        f"{found['roofline_tokens_per_second']:,.0f} tokens/s; compiled in {found['compile_cpu_seconds']:.0f} s of CPU "
        "time"
    )
    fits = "fits" if found["fits"] else "does not fit"
    return f"{fits}, peak {_peak(found)} of {_usable(found)} MiB a chip, remat {found['remat']}; {speed}"


def as_row(model: str, topology: str, found: dict[str, Any]) -> tuple[str, ...]:
    """A plan as a row of the table."""
    fits = "yes" if found["fits"] else "no"
    seconds = f"{found['roofline_step_seconds'] * 1e3:,.0f} ms"
    compiled = f"{found['compile_cpu_seconds']:.0f} s"
    return model, topology, fits, _peak(found), _usable(found), found["remat"], seconds, found["bound"], compiled


def _peak(found: dict[str, Any]) -> str:
    return "unknown" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 2**20:,.0f}"


def _usable(found: dict[str, Any]) -> str:
    return f"{found['usable_bytes'] / 2**20:,.0f}"


def read_table() -> dict[tuple[str, str], tuple[str, ...]]:
    """The rows of configs/PLANS.md, with a row for whatever it lacks."""
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


def write_table(rows: dict[tuple[str, str], tuple[str, ...]]) -> None:
    lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ("---",) * len(COLUMNS), *rows.values())]
    PLANS.write_text(_TEXT + "\n".join(lines) + "\n", encoding="utf-8")


_TEXT = """# What fits where

Written by `python tools/plan_recipes.py`: the train step compiled by `sft-jax plan` for hardware that is not there, one
row of 2,048 tokens a chip and step, `remat: auto`, weights and state split over all chips. LoRA has rank 16 on all
linear layers beside a bfloat16 base, QLoRA an nf4 base; full fine-tuning keeps weights and moments in float32. "of" is
what a process has of a chip's memory: all that the compiler gives on a TPU, three quarters on a GPU (jax's default;
workspaces of cuDNN are not counted). "no faster than" is a roofline from published peaks, with half of the tokens as
targets and one document a row; it is not a measurement of speed. Compile times are CPU time, of all cores together and
with the policies of rematerialisation that did not fit.

"""

if __name__ == "__main__":
    main()
