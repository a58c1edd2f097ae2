"""Shows the training data of a config: counts, lengths, dropped rows, and examples with their loss mask."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.config import Config
from sft_jax.data.batches.summary import summarize
from sft_jax.data.chat.pieces import pieces
from sft_jax.data.lint.leave_out import without
from sft_jax.data.lint.reading import Reading
from sft_jax.data.lint.summary import summarize_lint
from sft_jax.data.read.sources import prepare_to_open
from sft_jax.data.tokens.prepare import Prepared, check_data, prepare_data, read_data
from sft_jax.errors import UserError
from sft_jax.evaluation.task import prepare
from sft_jax.hf.config import read_architecture, stop_ids
from sft_jax.hf.hub import find_model
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.report.data_page import write_data_page
from sft_jax.report.data_text import ShownExample, example_text, summary_text
from sft_jax.report.lint_text import lint_text
from sft_jax.run.announce import Announcer


def inspect(
    config: Config, rows: int | None = None, as_json: bool = False, html: str | Path | None = None, lint: bool = False
) -> dict[str, Any]:
    """Show the training data of a config; returns a summary. Reads and downloads no weights.

    Args:
        rows: number of examples to show; by default 3, or all with ``as_json``.
        as_json: print one JSON object per line: the summary, the lint, then the examples.
        html: file for an HTML page.
        lint: also look for rows that seldom belong in training data; the summary has the result as ``lint``.

    Raises:
        UserError: the error that ``train`` raises for these data, after printing the summary.
    """
    if lint and config.data.streaming:
        raise UserError("--lint: compares all rows with each other; set data.streaming=false")
    if html is not None and not Path(html).parent.is_dir():
        raise UserError(f"--html: {Path(html).parent} is no folder")
    prepare_to_open([*config.data.train, *config.data.eval])
    folder = find_model(config.model.path, config.model.revision, weights=False)
    arch = read_architecture(folder)
    tokenizer, _ = load_tokenizer(
        folder, config.data.chat_template, config.data.added_tokens, config.data.template_kwargs
    )
    stops, positions = stop_ids(folder), arch.max_positions
    data = read_data(config.data, config.data.train, tokenizer, stops)
    read = None
    if config.data.leave_out and _is_usable(config, data, positions):
        read = Reading(data, _held_out(config, tokenizer, stops, positions))
        data = without(read, config.data.leave_out)
    summary = summarize(config.data, config.training, data)
    limit = len(data.examples) if rows is None and as_json else 3 if rows is None else rows
    if as_json:
        print(json.dumps({"summary": summary}), flush=True)
    else:
        for i in range(min(limit, len(data.examples))):
            print(example_text(_shown(data, tokenizer, i), _use_color()))
        print(summary_text(summary), flush=True)
    shown = []
    if html is not None:
        shown = [_shown(data, tokenizer, i) for i in range(min(max(limit, 12), 100, len(data.examples)))]
        write_data_page(Path(html), f"Data of {config.training.output_dir}", summary, shown)
    check_data(config.data, data, positions)
    read = read or Reading(data, _held_out(config, tokenizer, stops, positions))
    if lint:
        found = summarize_lint(read, config.data.leave_out)
        print(json.dumps({"lint": found}) if as_json else lint_text(found), flush=True)
        if html is not None:
            write_data_page(Path(html), f"Data of {config.training.output_dir}", summary, shown, found)
        summary = summary | {"lint": found}
    if as_json:
        for i in range(min(limit, len(data.examples))):
            print(json.dumps(_as_dict(data, i)))
    say = Announcer(enabled=not as_json)
    if read.held_out is not None:
        say.data("held out", read.held_out)
    if config.evaluation.at_end:
        say.task(prepare(config, arch, tokenizer, stops, data), names=("documents",))
    if html is not None:
        say("page", str(html))
    return summary


def _is_usable(config: Config, data: Prepared, max_positions: int) -> bool:
    """Whether ``train`` accepts the training data; if not, they are shown as they are, and then refused."""
    try:
        check_data(config.data, data, max_positions)
    except UserError:
        return False
    return True


def _held_out(config: Config, tokenizer: Any, stops: Sequence[int], max_positions: int) -> Prepared | None:
    """The held-out data, checked; None if the config has none."""
    if not config.data.eval:
        return None
    return prepare_data(config.data, config.data.eval, tokenizer, stops, max_positions, is_held_out=True)


def _as_dict(data: Prepared, index: int) -> dict[str, Any]:
    examples = data.examples
    ids, mask = examples[index]
    is_binary = bool(np.isin(mask, (0, 1)).all())
    return {
        "row": int(examples.row[index]),
        "source": examples.names[examples.source[index]],
        "input_ids": ids.tolist(),
        "loss_mask": (mask.astype(np.int32) if is_binary else mask).tolist(),
    }


def _shown(data: Prepared, tokenizer: Any, index: int) -> ShownExample:
    ids, mask = data.examples[index]
    supervised = mask > 0
    targets = ids[1:][supervised[1:]]
    last = next((int(i) for i in targets[::-1] if int(i) in data.examples.stop_ids), None)
    return ShownExample(
        data.examples.describe(index),
        pieces(tokenizer, ids.tolist(), supervised.tolist()),
        len(ids),
        len(targets),
        None if last is None else tokenizer.convert_ids_to_tokens(last),
    )


def _use_color() -> bool:
    """Whether to print colors: on a terminal, or as ``NO_COLOR`` and ``FORCE_COLOR`` set it."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()
