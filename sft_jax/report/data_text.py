"""Formats the data of a config for the terminal: statistics as a table, examples with supervised tokens in color."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SUPERVISED, _STOP, _DIM, _OFF = "\x1b[30;42m", "\x1b[30;43m", "\x1b[2m", "\x1b[0m"
_BAR = 40


@dataclass(frozen=True)
class ShownExample:
    """An example as spans of text with their loss mask."""

    name: str  # file and row
    pieces: list[tuple[str, bool]]  # text, and whether it carries loss
    num_tokens: int
    num_targets: int
    stop_token: str | None  # the last target


def summary_text(summary: dict[str, Any]) -> str:
    """Formats the result of :func:`sft_jax.data.batches.summary.summarize`."""
    lines = ["", f"  {'source':<44} {'format':<18} {'rows':>9} {'kept':>9} {'tokens':>12} {'targets':>12}"]
    for one in [*summary["sources"], *([_total(summary)] if len(summary["sources"]) > 1 else [])]:
        label = f"{one['label']}: " if one["label"] else ""
        space = max(12, 44 - len(label))
        name = label + (one["name"] if len(one["name"]) <= space else "…" + one["name"][1 - space :])
        lines.append(
            f"  {name:<44} {one['format']:<18} {one['rows']:>9,} {one['kept']:>9,} {one['tokens']:>12,} "
            f"{one['targets']:>12,}"
        )
    lines += ["", f"  {'written by':<44} {'tokens':>12} {'targets':>12}"]
    for role, count in summary["tokens_by_role"].items():
        lines.append(f"  {role:<44} {count:>12,} {summary['targets_by_role'].get(role, 0):>12,}")
    lines += ["", f"  tokens per example (maximum: data.max_length {summary['max_length']:,})"]
    largest = max((one["count"] for one in summary["lengths"]), default=0)
    for one in summary["lengths"]:
        bar = "█" * round(_BAR * one["count"] / largest) or ("▏" if one["count"] else "")
        beyond = "  too long" if one["from"] > summary["max_length"] and one["count"] else ""
        lines.append(f"  {one['from']:>8,} – {one['to']:<8,} {bar:<{_BAR}} {one['count']:>9,}{beyond}")
    if summary["dropped"] or summary["truncated"]:
        lines += ["", "  dropped or truncated"]
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
        lines += ["", "  notes", *(f"  {count:>9,}  {note}" for note, count in summary["notes"].items())]
    stops = ", ".join(f"{token!r} ({count:,} turns)" for token, count in summary["stop_tokens"].items()) or "none"
    lines += ["", f"  mask: train_on {summary['train_on']}, from {summary['mask_from']}", f"  stop token: {stops}"]
    if "packing_efficiency" in summary:
        lines.append(
            f"  packing: {summary['packed_rows']:,} sequences × {summary['max_length']:,} tokens per epoch, "
            f"{summary['packing_efficiency']:.1%} filled; {summary['steps_per_epoch']:,} steps per epoch, "
            f"{summary['steps']:,} in total"
        )
    return "\n".join(lines)


def example_text(row: ShownExample, color: bool) -> str:
    """Formats one example; without color, supervised tokens are in ⟦brackets⟧."""
    ends = f"ends with {row.stop_token!r}" if row.stop_token else "does not end with a stop token"
    head = f"{row.name}: {row.num_tokens:,} tokens, {row.num_targets:,} targets, {ends}"
    spans = []
    for text, supervised in merged(row.pieces):
        if not supervised:
            spans.append(text)
        elif not color:
            spans.append(f"⟦{text}⟧")
        else:
            stop = row.stop_token if row.stop_token and text.endswith(row.stop_token) else ""
            text = text.removesuffix(stop).replace("\n", f"⏎{_OFF}\n{_SUPERVISED}")
            spans.append(f"{_SUPERVISED}{text}{_OFF}" + (f"{_STOP}{stop}{_OFF}" if stop else ""))
    return (f"{_DIM}{head}{_OFF}" if color else head) + "\n" + "".join(spans) + "\n"


def merged(pieces: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Merges adjacent spans with the same loss mask."""
    spans: list[tuple[str, bool]] = []
    for text, supervised in pieces:
        if spans and spans[-1][1] == supervised:
            spans[-1] = (spans[-1][0] + text, supervised)
        else:
            spans.append((text, supervised))
    return spans


def _total(summary: dict[str, Any]) -> dict[str, Any]:
    return {"name": "all", "label": None, "format": ""} | {
        key: summary[key] for key in ("rows", "kept", "tokens", "targets")
    }
