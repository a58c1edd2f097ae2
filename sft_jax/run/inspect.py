"""Shows the training data of a config: counts, lengths, dropped rows, and examples with their loss mask."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.config import Config
from sft_jax.data.batches.summary import summarize
from sft_jax.data.chat.pieces import pieces
from sft_jax.data.read.sources import prepare_to_open
from sft_jax.data.tokens.prepare import Prepared, check_data, read_data
from sft_jax.errors import UserError
from sft_jax.evaluation.task import prepare
from sft_jax.hf.config import read_architecture, stop_ids
from sft_jax.hf.hub import find_model
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.report.data_page import write_data_page
from sft_jax.report.data_text import ShownExample, example_text, summary_text
from sft_jax.run.announce import Announcer


def inspect(
    config: Config, rows: int | None = None, as_json: bool = False, html: str | Path | None = None
) -> dict[str, Any]:
    """Show the training data of a config; returns a summary. Reads and downloads no weights.

    Args:
        rows: number of examples to show; by default 3, or all with ``as_json``.
        as_json: print one JSON object per line: the summary, then the examples.
        html: file for an HTML page.

    Raises:
        UserError: the error that ``train`` raises for these data, after printing the summary.
    """
    prepare_to_open([*config.data.train, *config.data.eval])
    folder = find_model(config.model.path, config.model.revision, weights=False)
    arch = read_architecture(folder)
    tokenizer, _ = load_tokenizer(
        folder, config.data.chat_template, config.data.added_tokens, config.data.template_kwargs
    )
    stops = stop_ids(folder)
    data = read_data(config.data, config.data.train, tokenizer, stops)
    summary = summarize(config.data, config.training, data)
    limit = len(data.examples) if rows is None and as_json else 3 if rows is None else rows
    if as_json:
        print(json.dumps({"summary": summary}), flush=True)
    else:
        color = _use_color()
        for i in range(min(limit, len(data.examples))):
            print(example_text(_shown(data, tokenizer, i), color))
        print(summary_text(summary), flush=True)
    if html is not None:
        path = Path(html)
        if not path.parent.is_dir():
            raise UserError(f"--html: {path.parent} is no folder")
        shown = [_shown(data, tokenizer, i) for i in range(min(max(limit, 12), 100, len(data.examples)))]
        write_data_page(path, f"Data of {config.training.output_dir}", summary, shown)
    check_data(config.data, data, arch.max_positions)
    if as_json:
        for i in range(min(limit, len(data.examples))):
            print(json.dumps(_as_dict(data, i)))
    say = Announcer(enabled=not as_json)
    if config.data.eval:
        held_out = read_data(config.data, config.data.eval, tokenizer, stops, refuse=True, is_held_out=True)
        check_data(config.data, held_out, arch.max_positions)
        say.data("held out", held_out)
    if config.evaluation.at_end:
        say.task(prepare(config, arch, tokenizer, stops, data), names=("documents",))
    if html is not None:
        say("page", str(html))
    return summary


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
