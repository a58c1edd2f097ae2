"""The text of ``bench.py grid``: a line for each case, ratios of the sides, and published figures beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmark.cases import PUBLISHED_LOAD, RATIOS, Case
from benchmark.train import machine

PUBLISHED = Path(__file__).with_name("published.json")
Record = dict[str, Any]


def heading(ceiling: dict[str, Any]) -> str:
    about = machine(ceiling["device"])
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return (
        f"{about['device']}, {about['cpu']}; {versions}\n"
        f"matrix products alone, {ceiling['dtype']}: {ceiling['gflops'] / 1e3:,.1f} TFLOP/s\n"
        f"{'':56}{'real tokens/s':>15}{'of products':>13}{'peak, GB':>10}"
    )


def line(record: Record) -> str:
    """One case: its speed, its share of the rate of matrix products, and its peak memory; or why there is none."""
    case, run = Case.of_json(record), record["run"]
    title = f"{case.name()}  {case.side}"
    if "error" in run:
        return f"{title:56}  {run['error']}"
    chosen = " ".join(str(run[key]) for key in ("attention", "remat") if key in run)
    speed, share = record["tokens_per_second"], record["share_of_ceiling"]
    return f"{title:56}{speed:>15,.0f}{share:>13.1%}{peak(record) / 1e9:>10.2f}  {chosen}"


def peak(record: Record) -> float:
    return record["run"]["device_peak_bytes"] or record["run"]["host_peak_bytes"]


def ratios(records: list[Record]) -> list[Record]:
    """Ratios of this library to TRL: both defaults, both recomputing, neither.

    Eight-bit products are compared with TRL in bfloat16, which trains in no eight bits here.
    """
    measured = {Case.of_json(one): one for one in records if "error" not in one["run"]}
    found = []
    for case, ours in measured.items():
        for side, other in RATIOS:
            if case.side != side:
                continue
            precision = case.precision if case.precision == "float32" else "bfloat16"
            theirs = measured.get(Case(case.shape, case.mode, precision, case.load, other))
            if theirs is None:
                continue
            found.append(
                case.as_json()
                | {
                    "other": other,
                    "other_precision": precision,
                    "tokens_per_second": ours["tokens_per_second"] / theirs["tokens_per_second"],
                    "peak_bytes": peak(ours) / peak(theirs),
                }
            )
    return found


def ratio_line(ratio: Record) -> str:
    other = ratio["other"]
    if ratio["other_precision"] != ratio["precision"]:
        other += f" ({ratio['other_precision']})"
    return (
        f"{Case.of_json(ratio).name()}: {ratio['side']} / {other}: {ratio['tokens_per_second']:.2f} × the real "
        f"tokens/s, {ratio['peak_bytes']:.2f} × the peak memory"
    )


def published(records: list[Record]) -> list[Record]:
    """The published figures and goals of each shape, method and precision, with this library's beside.

    This library's is that of :data:`PUBLISHED_LOAD`, None if it was not measured.
    """
    facts = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    here = {
        case.pair: one["tokens_per_second"]
        for one in records
        if "error" not in one["run"] and (case := Case.of_json(one)).side == "sft_jax"
    }
    groups: dict[Case, Record] = {}
    for name in ("goals", "published"):
        for fact in facts[name]:
            case = Case(fact["shape"], fact["mode"], fact["precision"], PUBLISHED_LOAD, "")
            entry = {"case": case.name(), "tokens_per_second": here.get(case), "goals": [], "published": []}
            groups.setdefault(case, entry)[name].append(fact)
    return list(groups.values())


def published_lines(group: Record) -> list[str]:
    ours = group["tokens_per_second"]
    lines = [f"{group['case']}: {'not measured' if ours is None else f'{ours:,.0f} tokens/s'}"]
    for goal in group["goals"]:
        text = f"goal on one {goal['hardware']}: {goal['tokens_per_second']:,}"
        if ours is not None:
            reached = "reached" if ours >= goal["tokens_per_second"] else "not reached"
            text += f", {reached} ({ours / goal['tokens_per_second']:.2f} ×)"
        lines.append(f"    {text}")
    for fact in group["published"]:
        about = [fact["model"], fact["hardware"]]
        if fact["sequence_length"]:
            about.append(f"sequences of {fact['sequence_length']:,}")
        text = f"{fact['source']}: {fact['tokens_per_second']:,} ({', '.join(about)})"
        lines.append(f"    {text}" + ("" if ours is None else f", {ours / fact['tokens_per_second']:.2f} ×"))
    return lines
