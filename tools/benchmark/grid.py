"""Benchmarks training for many shapes, methods, precisions and loads on one accelerator, as far as the time goes.

:mod:`benchmark.train` starts a process for each case. Here two processes with all imports done serve all cases: one
forks for each case of this library, and one trains all cases with TRL. Measures steps and device memory, not startup.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmark import table
from benchmark.cases import COMPARED_LOAD, MODES, PRECISIONS, SHAPES, SIDES, Case, Load, cases
from benchmark.kit import SHAPES as KNOWN_SHAPES
from benchmark.kit import Kit, make_kit, model_config
from benchmark.room import host_bytes, refusal_of
from benchmark.server import CASE_SECONDS, Server
from benchmark.train import GPU_MEMORY, check_peer, machine, model_rate

ON_A_CPU = ("tiny", "44m", "50m", "135m")  # shapes that are small enough for a CPU
FILE = "grid.jsonl"
# With --tiny: all methods, both kinds of documents, in minutes on a CPU.
TINY = {
    "shapes": ["tiny"], "loads": [Load("short", 256, 2), Load("long", 256, 1)], "compare": [Load("short", 256, 2)],
    "steps": 2, "warmup": 1,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=Path, help="the short documents, a .jsonl with question and answer, such as "
                        "GSM8K's train.jsonl; default: generated, with the lengths of GSM8K")  # fmt: skip
    parser.add_argument("--shapes", nargs="+", choices=KNOWN_SHAPES)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bfloat16", "fp8"],
                        help="int8, fp8: of large products, where all else is bfloat16")  # fmt: skip
    parser.add_argument("--loads", nargs="+", type=Load.parse, metavar="KIND:LENGTHxSEQUENCES",
                        help="documents and sequences per step, such as short:2048x8 or long:8192x2")  # fmt: skip
    parser.add_argument("--steps", type=int, help="measured steps per case; default 4")
    parser.add_argument("--warmup", type=int, help="steps before them; default 2")
    parser.add_argument("--compare", nargs="+", type=Load.parse, metavar="LOAD",
                        help=f"loads that TRL trains too; default: {COMPARED_LOAD}, or those of --loads")  # fmt: skip
    parser.add_argument("--self-only", action="store_true", help="without TRL")
    parser.add_argument("--sparing", choices=("no", "also", "only"), default="also", help="this library with full "
                        "rematerialization, TRL without gradient checkpointing")  # fmt: skip
    parser.add_argument("--minutes", type=float, help="stop after this time")
    parser.add_argument("--kit", type=Path, help="folder to create and keep models in; default: a temporary one")
    parser.add_argument("--out", type=Path, help=f"folder of {FILE}, a line per finished case, which the same command "
                        "does not measure again, and of grid.json")  # fmt: skip
    parser.add_argument("--retry", action="store_true", help="measure failed cases of --out again")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on any device, to test all of it")
    parser.add_argument("--list", metavar="CHIP", help="only list the cases for a chip, such as h200, in their order")
    parser.set_defaults(run=bench_grid)


def bench_grid(options: argparse.Namespace) -> None:
    defaults: dict[str, Any] = {"shapes": SHAPES, "loads": None, "compare": [COMPARED_LOAD], "steps": 4, "warmup": 2}
    if options.compare is None and options.loads is not None:
        options.compare = options.loads
    for name, value in (TINY if options.tiny else defaults).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    listed = cases(
        options.shapes, options.modes, options.precisions, options.loads, options.compare or (), not options.self_only,
        options.sparing,
    )  # fmt: skip
    if options.list:
        print("\n".join(_listed(options, listed)))
        return
    check_peer(options.self_only)
    deadline = time.monotonic() + (options.minutes * 60 if options.minutes is not None else float("inf"))
    with tempfile.TemporaryDirectory() as scratch:
        sides = {SIDES[case.side][0] for case in listed}
        servers = {who: Server(who, Path(scratch)) for who in ("sft_jax", *sorted(sides - {"sft_jax"}))}
        try:
            grid = _Grid(options, servers, Path(scratch), deadline)
            records = grid.run(listed)
        finally:
            for server in servers.values():
                server.close()
    found = {"ratios": table.ratios(records), "published": table.published(records)}
    print("\n".join(["", *map(table.ratio_line, found["ratios"])]))
    print("\n".join(["", *(line for group in found["published"] for line in table.published_lines(group))]))
    if options.out:
        found = {"machine": machine(grid.ceiling["device"]), "ceiling": grid.ceiling, "cases": records, **found}
        (options.out / "grid.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def options_of(case: Case, options: argparse.Namespace, kit: Kit | None) -> dict[str, Any]:
    """Returns the options of the runner of a case; without a kit, those that say what it needs."""
    stored = case.dtype if case.mode == "full" else "float32"
    per_step = case.load.length * case.load.sequences
    return {
        "kit": str(kit.folder) if kit else case.shape,
        "rows": kit.rows if kit else "none",
        "mode": case.mode,
        "dtype": case.dtype,
        "compute": case.precision if case.precision in ("int8", "fp8") else None,
        "steps": options.steps,
        "warmup": options.warmup,
        "row_length": case.load.length,
        "batch_size": case.load.sequences,
        "conversations": max(1, round(per_step / float(kit.lengths.mean()))) if kit else 1,
        "attention": "auto",
        "remat": "auto",
        "quantization": "nf4" if case.mode == "qlora" else None,
        "param_dtype": stored,
        "moments": stored,
        **SIDES[case.side][1],
    }


def _listed(options: argparse.Namespace, listed: list[Case]) -> list[str]:
    """The cases in their order, each with the memory that it needs at least, or why it is skipped."""
    from sft_jax.planning.topology import parse_topology

    usable = int(float(*GPU_MEMORY.values()) * parse_topology(f"{options.list}:1", "--list").chip.hbm_bytes)
    refusal, lines = _refusals(options, usable), []
    for case in listed:
        lines.append(f"{case.name()}  {case.side}".ljust(56) + f"  {refusal(case) or 'runs'}")
    return lines


def _refusals(options: argparse.Namespace, usable: int) -> Callable[[Case], str | None]:
    """Returns a function of why a case cannot run, computed once for all sides of a pair."""
    known: dict[Case, str | None] = {}

    def refusal(case: Case) -> str | None:
        if case.pair not in known:
            known[case.pair] = refusal_of(case.shape, options_of(case, options, None), usable)
        return known[case.pair]

    return refusal


class _Grid:
    """The measurement of all cases on the device of this machine."""

    def __init__(self, options: argparse.Namespace, servers: dict[str, Server], scratch: Path, deadline: float):
        self._options, self._servers, self._deadline = options, servers, deadline
        self._kits = options.kit or scratch
        device = self._answer("device", {})
        large = [shape for shape in options.shapes if shape not in ON_A_CPU]
        if large and device["platform"] == "cpu":  # before kits of many GB are written
            sys.exit(
                f"bench: nothing was measured: {', '.join(large)} need an accelerator, and JAX found none; on a CPU "
                "use --tiny, or `bench.py train`"
            )
        self._refusal = _refusals(options, device["usable_bytes"] or host_bytes())
        self._settings = {
            "device": device["device"],
            "steps": options.steps,
            "warmup": options.warmup,
            "rows": options.rows.name if options.rows else "generated",
            "jax": version("jax"),
        }
        self._done = self._read()
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
        self.ceiling = next((one["ceiling"] for one in self._done.values()), None) or self._ceiling(device, scratch)

    def run(self, listed: list[Case]) -> list[table.Record]:
        """Measures, prints and keeps all cases that were not measured before; returns the records of all."""
        print(table.heading(self.ceiling), flush=True)
        records, late = [], 0
        for case in listed:
            record = self._done.get(case)
            if record is None or (self._options.retry and "error" in record["run"]):
                run = self._measure(case)
                if run is None:
                    late += 1
                    continue
                record = self._keep(case, run)
            records.append(record)
            print(table.line(record), flush=True)
        if late:
            again = "the same command measures them" if self._options.out else "with --out, a second run measures them"
            print(f"{late} cases not measured: past the limit of {self._options.minutes:g} minutes; {again}")
        return records

    def _measure(self, case: Case) -> dict[str, Any] | None:
        """Returns the result of a case; None if the time is over."""
        reason = self._refusal(case)
        if reason is not None:
            return {"error": reason, "skipped": True}
        if self._left() <= 0:
            return None
        who, kit = SIDES[case.side][0], self._kit(case)
        if (seconds := self._left()) <= 0:
            return None
        run = self._servers[who](who, options_of(case, self._options, kit), min(CASE_SECONDS, seconds))
        return None if "error" in run and self._left() <= 0 else run

    def _kit(self, case: Case) -> Kit:
        rows, load = self._options.rows, case.load
        return make_kit(self._kits, case.shape, rows, case.dtype, load.documents, load.length)

    def _keep(self, case: Case, run: dict[str, Any]) -> table.Record:
        """Returns the record of a case, after it is written if it was measured."""
        record: table.Record = {**case.as_json(), "settings": self._settings, "ceiling": self.ceiling, "run": run}
        if "error" not in run:
            seconds = statistics.median(run["step_seconds"])
            # By the median step, so that an interrupted step does not count.
            record["tokens_per_second"] = sum(run["real_tokens"]) / len(run["real_tokens"]) / seconds
            scale = sum(run["step_seconds"]) / (seconds * len(run["step_seconds"]))
            rate = model_rate(self._kit(case), case.mode, [run]) * scale
            record["share_of_ceiling"] = rate / 1e9 / self.ceiling["gflops"]
        if self._options.out and "skipped" not in run:
            with (self._options.out / FILE).open("a", encoding="utf-8") as file:
                print(json.dumps(record), file=file)
        return record

    def _read(self) -> dict[Case, table.Record]:
        """Reads what was measured before with the same settings; the last line of a case counts."""
        path = self._options.out / FILE if self._options.out else None
        if path is None or not path.is_file():
            return {}
        found = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a run that was killed while it wrote
                continue
            if record["settings"] == self._settings:
                found[Case.of_json(record)] = record
        return found

    def _ceiling(self, device: dict[str, Any], scratch: Path) -> dict[str, Any]:
        """The rate of matrix products: those of the first shape, and large ones."""
        dtype = "float32" if device["platform"] == "cpu" else "bfloat16"  # a CPU has no fast products in 16 bits
        folder = scratch / "ceiling"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(model_config(self._options.shapes[0], dtype)))
        return self._answer("ceiling", {"kit": str(folder), "batch_size": 8, "row_length": 2048, "dtype": dtype}) | {
            "dtype": dtype
        }

    def _answer(self, what: str, options: dict[str, Any]) -> dict[str, Any]:
        """Runs a required measurement on this library's side; exits if it fails."""
        result = self._servers["sft_jax"](what, options)
        if "error" in result:
            sys.exit(f"bench: nothing was measured: {result['error']}")
        return result

    def _left(self) -> float:
        return self._deadline - time.monotonic()
