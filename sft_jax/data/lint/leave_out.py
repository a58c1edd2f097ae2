"""Leaves out the training examples that ``data.leave_out`` names."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from sft_jax.data.lint.reading import Reading
from sft_jax.data.lint.rules import find
from sft_jax.data.tokens.examples import Report
from sft_jax.data.tokens.prepare import Prepared
from sft_jax.distributed import processes
from sft_jax.errors import UserError


def implied(names: Sequence[str]) -> list[str]:
    """Add ``exact_duplicates`` to ``near_duplicates``, because a copy is as near as can be."""
    return [*names, "exact_duplicates"] if "near_duplicates" in names else [*names]


def leave_out(data: Prepared, held_out: Prepared | None, names: Sequence[str]) -> Prepared:
    """Leave examples out, and count them in the report. A collective: all processes have to call it.

    The same as :func:`without` with a reading that is not used again.

    Args:
        names: entries of ``data.leave_out``; without any, the data are returned as they are.

    Raises:
        UserError: no example is left, or ``leaks`` is named and there are no held-out data.
    """
    return without(Reading(data, held_out), names) if names else data


def without(read: Reading, names: Sequence[str]) -> Prepared:
    """Leave out what some rules find.

    An example that several rules find is counted once. Of duplicates, the first that no other rule finds stays.
    """
    if "leaks" in names and read.held_out is None:
        raise UserError("data.leave_out: leaks are looked for in held-out data; set data.eval, or remove leaks")
    examples = read.data.examples
    gone = np.zeros(len(examples), bool)
    found: list[tuple[str, np.ndarray]] = []

    def add(name: str, which: np.ndarray) -> None:
        found.append((name, which[~gone[which]]))
        gone[which] = True

    names = implied(names)
    others = [name for name in names if not name.endswith("_duplicates")]
    for finding in find(read, others):
        training = read.leaks.training if finding.name == "leaks" and read.leaks is not None else finding.examples
        add(finding.name, training)
    if "exact_duplicates" in names:
        exact, near, _ = read.duplicates(gone, "near_duplicates" in names)
        add("exact_duplicates", exact)
        add("near_duplicates", near)
    _check_all_agree(gone)
    if gone.all():
        raise UserError(
            f"data.leave_out: {', '.join(names)} leaves out all {len(examples):,} examples; use fewer names"
        )
    return _without(read, gone, found)


def _without(read: Reading, gone: np.ndarray, found: list[tuple[str, np.ndarray]]) -> Prepared:
    examples, keep = read.data.examples, ~gone
    sources = []
    for index, source in enumerate(read.data.report.sources):
        here = keep & (examples.source == index)
        counts = {name: int((examples.source[which] == index).sum()) for name, which in found}
        sources.append(
            dataclasses.replace(
                source,
                kept=int(here.sum()),
                tokens=int(examples.lengths[here].sum()),
                targets=int(read.columns.targets[here].sum()),
                left_out={name: count for name, count in counts.items() if count},
            )
        )
    report = read.data.report
    return dataclasses.replace(
        read.data,
        examples=examples.take(keep),
        report=Report(sources, report.tally, report.stop_tokens),
    )


def _check_all_agree(gone: np.ndarray) -> None:
    """Check that all processes leave out the same examples: they train on the same batches.

    Raises:
        UserError: they do not.
    """
    digests = processes.gather(
        "what is left out", hashlib.blake2b(gone.tobytes()).hexdigest(), processes.LONG_WAIT_SECONDS
    )
    if len(set(digests)) > 1:
        raise UserError(
            "data.leave_out: the processes do not find the same rows; the versions of Python and numpy must be the "
            "same on every host"
        )
