"""Formats the lint of a config for the terminal."""

from __future__ import annotations

from typing import Any

_WIDTH = 22


def lint_text(lint: dict[str, Any]) -> str:
    """Formats the result of :func:`sft_jax.data.lint.summary.summarize_lint`."""
    held_out = "" if lint["held_out"] is None else f" and {lint['held_out']:,} held-out"
    lines = ["", f"  lint of {lint['examples']:,} training{held_out} examples"]
    if lint["findings"]:
        lines += ["", f"  {'finding':<{_WIDTH}} {'examples':>10} {'share':>7}"]
    for one in lint["findings"]:
        lines.append(f"  {label(one):<{_WIDTH}} {one['count']:>10,} {share(one):>7}  {kind(one)}{one['what']}")
        for row in one["shown"]:
            note = f": {row['note']}" if row["note"] else ""
            lines += [f"      {row['source']} row {row['row']}{note}", f"          {row['text']}"]
        more = one["count"] - len(one["shown"])
        if more > 0:
            lines.append(f"      … and {more:,} more; --json lists all rows")
        lines.append(f"      {advice(one)}")
    if lint["nothing"]:
        names = ", ".join(name.replace("_", " ") for name in lint["nothing"])
        lines += ["", f"  nothing found: {names}"]
    lines += [f"  not looked for: {name.replace('_', ' ')}, because {why}" for name, why in lint["not_checked"].items()]
    return "\n".join(lines)


def label(finding: dict[str, Any]) -> str:
    """The name of a finding in words."""
    return finding["name"].replace("_", " ")


def share(finding: dict[str, Any]) -> str:
    """The share of the examples; small ones with more digits."""
    return f"{finding['share']:.1%}" if finding["share"] >= 0.001 else f"{finding['share']:.3%}"


def kind(finding: dict[str, Any]) -> str:
    """What a finding is, unless it is a defect."""
    return "" if finding["certainty"] == "defect" else f"{finding['certainty']}: "


def advice(finding: dict[str, Any]) -> str:
    """What to do."""
    if finding["is_left_out"]:
        return f"→ left out by data.leave_out: [{finding['name']}]"
    switch = f" (data.leave_out: [{finding['name']}])" if finding["can_leave_out"] else ""
    return f"→ {finding['advice']}{switch}"
