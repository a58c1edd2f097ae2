"""Formats a plan as text."""

from __future__ import annotations

from typing import Any

from sft_jax.planning.compiled_time import compiled_text

_NOT_COUNTED = "not counted: the compiler wrote no HLO text for this chip"


def plan_text(plan: dict[str, Any]) -> str:
    """Formats the figures of a plan (see :func:`sft_jax.planning.plan.figures`) as a table."""
    lines = [*_heading(plan), "", *_memory(plan), "", *_network(plan), "", *_speed(plan), ""]
    lines += [*compiled_text(plan["compiled"]), "", *_verdict(plan)]
    if "search" in plan:
        lines += ["", *_search(plan["search"])]
    return "\n".join(lines)


def _heading(plan: dict[str, Any]) -> list[str]:
    mesh = " × ".join(f"{name} {size}" for name, size in plan["mesh"].items())
    return [
        f"{plan['topology']}: {plan['num_devices']} chips, mesh {mesh}; {plan['rows_at_a_time']} sequence(s) per "
        f"microbatch and batch shard, remat {plan['remat']}, attention {plan['attention']}",
        *([f"experts: {plan['experts']}"] if plan.get("experts") else []),
    ]


def _memory(plan: dict[str, Any]) -> list[str]:
    parts = plan["part_bytes"]
    rows = [
        ("frozen weights", parts["frozen"]),
        ("trained weights", parts["trained"]),
        ("optimizer", parts["optimizer"]),
        ("batch", parts["batch"]),
    ]
    if plan["argument_bytes"] is not None:
        known = sum(size for _, size in rows)
        beyond = plan["peak_bytes"] - plan["argument_bytes"]
        gradients = min(parts["gradients"], beyond)
        rows.append(("padding of the above", plan["argument_bytes"] - known))
        rows.append(("gradients", gradients))
        rows.append(("activations, temporaries", beyond - gradients))
    lines = [_row("memory per chip", "MiB"), *(_row(name, f"{size / 2**20:,.0f}") for name, size in rows if size)]
    peak, usable = plan["peak_bytes"], plan["usable_bytes"]
    if peak is None:
        return [*lines, _row("peak", "too large")]
    room = usable - peak if plan["room_bytes"] is None else plan["room_bytes"]
    lines += [_row("peak", f"{peak / 2**20:,.0f}"), _row("room left", f"{room / 2**20:,.0f}")]
    share = usable / plan["hbm_bytes"]
    of = "" if share == 1 else f", {share:.0%} of the chip's {plan['hbm_bytes'] / 2**30:.1f} GiB"
    spare = "" if not plan["spare_bytes"] else f", {plan['spare_bytes'] / 2**20:,.0f} MiB kept as headroom"
    return [*lines, f"  of {usable / 2**30:.2f} GiB available to the process{of}{spare}"]


def _network(plan: dict[str, Any]) -> list[str]:
    if plan["num_devices"] == 1:
        return ["collectives: none on one chip"]
    if plan["collectives"] is None:
        why = _NOT_COUNTED if plan["fits"] else "not counted: no program"
        return [f"collectives: {why}"]
    between = any(one["bytes_between_hosts"] for one in plan["collectives"])
    lines = [
        f"{'collectives per step':26} {'count':>10} {'MiB sent per chip':>20}"
        + (f" {'to other hosts':>16}" if between else "")
    ]
    for one in plan["collectives"]:
        lines.append(
            f"  {one['kind']:24} {one['count']:>10,.0f} {one['bytes'] / 2**20:>20,.0f}"
            + (f" {one['bytes_between_hosts'] / 2**20:>16,.0f}" if between else "")
        )
    return lines


def _speed(plan: dict[str, Any]) -> list[str]:
    network = plan["network_seconds"]
    bounds = {"compute": plan["compute_seconds"], "memory": plan["memory_seconds"]}
    shown = ", ".join(f"{name} {seconds * 1e3:,.1f} ms" for name, seconds in bounds.items())
    shown += ", network not counted" if network is None else f", network {network * 1e3:,.1f} ms"
    repeated = plan["flops_per_step"] / plan["model_flops_per_step"] - 1
    recomputed = f", {repeated:.0%} more recomputed" if repeated > 0 else ""
    return [
        f"{plan['tokens_per_step']:,} tokens per step ({plan['target_share']:.0%} targets, documents of "
        f"{plan['document_length']:,}): {plan['model_flops_per_step'] / 1e12:,.1f} model TFLOP{recomputed}",
        f"no faster than {plan['roofline_step_seconds'] * 1e3:,.1f} ms per step, bound by {plan['bound']} ({shown}): "
        f"at most {plan['roofline_tokens_per_second']:,.0f} tokens/s",
        f"compiled in {plan['compile_seconds']:.1f} s ({plan['compile_cpu_seconds']:.1f} s of CPU time)",
    ]


def _verdict(plan: dict[str, Any]) -> list[str]:
    if plan["fits"]:
        return ["fits"]
    if "advice" not in plan:
        return ["does not fit"]
    advice = plan["advice"]
    if advice["changes"] is None:
        tried = "; ".join(
            dict.fromkeys(f"{one['changes'] or 'unchanged'} on {one['topology']}" for one in advice["tried"])
        )
        return ["does not fit, and no change that was tried makes it fit" + (f": {tried}" if tried else "")]
    where = "" if advice["topology"] == plan["topology"] else f" --topology {advice['topology']}"
    peak = f"; peak {advice['peak_bytes'] / 2**20:,.0f} MiB"
    return [f"does not fit; fits with {advice['changes']}{where}{peak}"]


def _search(choices: list[dict[str, Any]]) -> list[str]:
    fitting = [choice for choice in choices if choice["fits"]]
    if not fitting:
        return [f"search: none of the {len(choices)} compiled configs fits"]
    by = {
        "cycles": "by the compiler's estimate of cycles, or the network where that takes longer",
        "roofline": "by their rooflines, since the compiler estimates no cycles",
    }[fitting[0]["ranked_by"]]
    lines = [f"search: predicted speed of the compiled configs that fit, {by}"]
    for choice in fitting:
        lines.append(
            f"  {choice['predicted_tokens_per_second']:>12,.0f} tokens/s, bound by {choice['bound']}, peak "
            f"{choice['peak_bytes'] / 2**20:,.0f} MiB: {choice['changes']}"
        )
    return lines


def _row(name: str, value: str) -> str:
    return f"  {name:26} {value:>12}"
