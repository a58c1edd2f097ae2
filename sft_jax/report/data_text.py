"""The data of a config for the terminal: figures as a table, rows with what is trained in colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_TRAINED, _STOP, _DIM, _OFF = "\x1b[30;42m", "\x1b[30;43m", "\x1b[2m", "\x1b[0m"
_BAR = 40


@dataclass(frozen=True)
class ShownRow:
    """An example as pieces of text, each with whether it is trained."""

    name: str  # file and row
    pieces: list[tuple[str, bool]]
    num_tokens: int
    num_targets: int
    stop_token: str | None  # the last target


def summary_text(summary: dict[str, Any]) -> str:
    """The figures of :func:`sft_jax.data.batches.summary.summarise`."""
    lines = ["", f"  {'source':<44} {'format':<18} {'rows':>9} {'kept':>9} {'tokens':>12} {'targets':>12}"]
    for one in [*summary["sources"], *([_total(summary)] if len(summary["sources"]) > 1 else [])]:
        name = one["name"] if len(one["name"]) <= 44 else "…" + one["name"][-43:]
        lines.append(
            f"  {name:<44} {one['format']:<18} {one['rows']:>9,} {one['kept']:>9,} {one['tokens']:>12,} "
            f"{one['targets']:>12,}"
        )
    lines += ["", f"  {'written by':<44} {'tokens':>12} {'targets':>12}"]
    for role, count in summary["tokens_by_role"].items():
        lines.append(f"  {role:<44} {count:>12,} {summary['targets_by_role'].get(role, 0):>12,}")
    lines += ["", f"  tokens an example (longest allowed: data.max_length {summary['max_length']:,})"]
    most = max((one["count"] for one in summary["lengths"]), default=0)
    for one in summary["lengths"]:
        bar = "█" * round(_BAR * one["count"] / most) or ("▏" if one["count"] else "")
        beyond = "  too long" if one["from"] > summary["max_length"] and one["count"] else ""
        lines.append(f"  {one['from']:>8,} – {one['to']:<8,} {bar:<{_BAR}} {one['count']:>9,}{beyond}")
    if summary["dropped"] or summary["truncated"]:
        lines += ["", "  left out"]
        lines += [f"  {count:>9,}  {reason}" for reason, count in summary["dropped"].items()]
        if summary["truncated"]:
            lines.append(f"  {summary['truncated']:>9,}  truncated")
        lines.append(
            f"  {summary['targets_lost']:>9,}  targets lost by length ({summary['share_of_targets_lost']:.1%})"
        )
    if summary["refused"]:
        lines += ["", "  refused rows", *(f"  {reason}" for reason in summary["refused"])]
    if summary["not_read"]:
        lines += ["", "  not read", *(f"  {line}" for line in summary["not_read"])]
    if summary["notes"]:
        lines += ["", "  worth knowing", *(f"  {count:>9,}  {note}" for note, count in summary["notes"].items())]
    stops = ", ".join(f"{token!r} ({count:,} turns)" for token, count in summary["stop_tokens"].items()) or "none"
    lines += ["", f"  mask: train_on {summary['train_on']}, from {summary['mask_from']}", f"  stop token: {stops}"]
    if "packing_efficiency" in summary:
        lines.append(
            f"  packing: {summary['packed_rows']:,} rows × {summary['max_length']:,} slots an epoch, "
            f"{summary['packing_efficiency']:.1%} filled; {summary['steps_per_epoch']:,} steps an epoch, "
            f"{summary['steps']:,} in all"
        )
    return "\n".join(lines)


def row_text(row: ShownRow, colour: bool) -> str:
    """One example; without colour, what is trained stands in ⟦brackets⟧."""
    ends = f"ends with {row.stop_token!r}" if row.stop_token else "does not end with a stop token"
    head = f"{row.name}: {row.num_tokens:,} tokens, {row.num_targets:,} targets, {ends}"
    parts = []
    for text, trained in merged(row.pieces):
        if not trained:
            parts.append(text)
        elif not colour:
            parts.append(f"⟦{text}⟧")
        else:
            stop = row.stop_token if row.stop_token and text.endswith(row.stop_token) else ""
            text = text.removesuffix(stop).replace("\n", f"⏎{_OFF}\n{_TRAINED}")
            parts.append(f"{_TRAINED}{text}{_OFF}" + (f"{_STOP}{stop}{_OFF}" if stop else ""))
    return (f"{_DIM}{head}{_OFF}" if colour else head) + "\n" + "".join(parts) + "\n"


def merged(pieces: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Neighbours that are alike in being trained, as one."""
    found: list[tuple[str, bool]] = []
    for text, trained in pieces:
        if found and found[-1][1] == trained:
            found[-1] = (found[-1][0] + text, trained)
        else:
            found.append((text, trained))
    return found


def _total(summary: dict[str, Any]) -> dict[str, Any]:
    return {"name": "all", "format": ""} | {key: summary[key] for key in ("rows", "kept", "tokens", "targets")}
