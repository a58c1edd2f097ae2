"""Outliers of a source: answers in another script, and lengths far from those of nearly all others."""

from __future__ import annotations

import numpy as np

from sft_jax.data.lint.answers import of_each_source
from sft_jax.data.lint.columns import Columns
from sft_jax.data.lint.scripts import NONE
from sft_jax.data.tokens.examples import Examples

_FEWEST = 50  # examples of a source, to tell what is usual
_MOST = 0.95  # of the answers have the usual script
_RARE_SHARE, _RARE_AT_LEAST = 0.01, 2  # of the answers have an unusual script
_FAR = 3.0  # times the distance of the quartiles, beyond them: "far out" (Tukey 1977)
_NARROWEST = 0.5  # distance of the quartiles of log lengths: lengths that are all alike have no outliers nearby
_SHORT = 16  # tokens: where the median is shorter, no answer is too short


def script_outliers(examples: Examples, script: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find answers in a script that hardly any other answer of the source has.

    Args:
        script: of each answer, as :func:`sft_jax.data.lint.scripts.main_scripts` returns it.

    Returns:
        The examples, ascending, and the usual script of each.
    """
    found, usual = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for here in of_each_source(examples):
        here = here[script[here] != NONE]
        if len(here) < _FEWEST:
            continue
        counts = np.bincount(script[here])
        if counts.max() < _MOST * len(here):
            continue
        rare = here[counts[script[here]] <= max(_RARE_AT_LEAST, _RARE_SHARE * len(here))]
        found.append(rare)
        usual.append(np.full(len(rare), counts.argmax()))
    return _ascending(found, usual)


def length_outliers(examples: Examples, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Find answers whose length is far from that of the others of the source, on a log scale.

    Returns:
        The examples, ascending, and the median of the source of each.
    """
    found, medians = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    lengths = (columns.ends - columns.begins).astype(np.int64)
    for here in of_each_source(examples):
        if len(here) < _FEWEST:
            continue
        logs = np.log(np.maximum(lengths[here], 1))
        low, middle, high = np.quantile(logs, (0.25, 0.5, 0.75))
        reach = _FAR * max(high - low, _NARROWEST)
        median = round(float(np.exp(middle)))
        is_far = (logs > high + reach) | ((logs < low - reach) & (median >= _SHORT))
        found.append(here[is_far])
        medians.append(np.full(int(is_far.sum()), median))
    return _ascending(found, medians)


def _ascending(found: list[np.ndarray], values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    examples, value = np.concatenate(found), np.concatenate(values)
    order = np.argsort(examples, kind="stable")
    return examples[order], value[order]
