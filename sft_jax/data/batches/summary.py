"""Summarizes the data of a config as JSON values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sft_jax.config import DataConfig, TrainingConfig
from sft_jax.data.batches.packing import plan_of
from sft_jax.data.tokens.prepare import Prepared

_NUM_BINS = 16  # of the histogram
_MAX_REASONS = 20


def summarize(data: DataConfig, training: TrainingConfig, prepared: Prepared) -> dict[str, Any]:
    """Count rows, tokens, supervised tokens (``targets``) and dropped examples, by source and role.

    ``packing_efficiency`` is the fraction of tokens that are not padding.
    """
    report, examples = prepared.report, prepared.examples
    stops = report.stop_tokens
    summary: dict[str, Any] = {
        "rows": report.total("rows"),
        "examples": report.total("examples"),
        "kept": report.total("kept"),
        "tokens": report.total("tokens"),
        "targets": report.total("targets"),
        "dropped": report.dropped_by_reason,
        "truncated": report.total("truncated"),
        "targets_lost": report.total("targets_lost"),
        "share_of_targets_lost": report.fraction_lost,
        "refused": [one.at(source.name) for source in report.sources for one in source.reasons[:_MAX_REASONS]],
        "stop_token": next(iter(stops), None),
        "stop_tokens": stops,
        "train_on": data.train_on,
        "mask_from": prepared.encoder.mask_source,
        "sources": [
            {
                "name": source.name,
                "label": source.label,
                "format": source.format,
                "rows": source.rows,
                "kept": source.kept,
                "tokens": source.tokens,
                "targets": source.targets,
                "dropped": source.dropped + source.dropped_without_targets + source.refused,
                "left_out": source.left_out,
                "weight": weight,
                "not_read": source.unread,
                "passed_over": list(source.passed_over),
            }
            for source, weight in zip(report.sources, examples.weights, strict=True)
        ],
        "not_read": report.not_read,
        "tokens_by_role": dict(report.tally.tokens.most_common()),
        "targets_by_role": dict(report.tally.targets.most_common()),
        "notes": {note: count for note, count in report.tally.notes.most_common() if count},
        "lengths": _histogram(np.concatenate([np.asarray(part.lengths) for part in examples.parts]), data.max_length),
        "max_length": data.max_length,
    }
    if len(examples):
        epoch = plan_of(data, replace(training, num_train_epochs=1, max_steps=None), examples)
        summary |= {
            "packing_efficiency": int(examples.num_tokens[epoch.items].sum()) / max(1, epoch.num_tokens),
            "packed_rows": len(epoch.rows) - 1,
            "steps_per_epoch": epoch.num_steps,
            "steps": plan_of(data, training, examples).num_steps,
        }
    return summary


def _histogram(lengths: np.ndarray, max_length: int) -> list[dict[str, int]]:
    """Count examples by length in bins of equal width; the last bin holds all examples longer than ``max_length``.

    With lengths 5, 16 and 30 and a ``max_length`` of 16, the first bin is ``5 – 5``, the last one ``17 – 30``.
    """
    if len(lengths) == 0:
        return []
    longest = int(lengths.max())
    top = min(longest, max_length)
    width = max(1, -(-top // _NUM_BINS))
    counts = np.bincount((lengths[lengths <= max_length] - 1) // width, minlength=-(-top // width))
    bins = [{"from": i * width + 1, "to": min((i + 1) * width, top), "count": int(n)} for i, n in enumerate(counts)]
    bins = bins[next((i for i, one in enumerate(bins) if one["count"]), len(bins)) :]  # removes empty bins at the start
    if longest > max_length:
        bins.append({"from": max_length + 1, "to": longest, "count": int((lengths > max_length).sum())})
    return bins
