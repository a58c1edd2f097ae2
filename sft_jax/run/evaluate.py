"""Evaluates a run: compares the base and the tuned model as a table, JSON and an HTML page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax

from sft_jax.assembly import Model, check_mesh, network_of, open_tuned
from sft_jax.config import Config
from sft_jax.evaluation.compare import Comparison, compare
from sft_jax.evaluation.task import prepare
from sft_jax.files.digests import Words, texts
from sft_jax.hf.verify import check_tensors
from sft_jax.report import table
from sft_jax.report.write import write_report
from sft_jax.run.announce import Announcer
from sft_jax.run.attention import settle_attention
from sft_jax.sharding import check_heads
from sft_jax.store.metrics import read_metrics
from sft_jax.store.opened import open_run
from sft_jax.store.steps import Step
from sft_jax.training.programs import keep_programs
from sft_jax.training.weights import load_weights
from sft_jax.tree import flatten, unflatten


def evaluate(
    config: Config,
    step: Step = None,
    as_json: bool = False,
    devices: Sequence[Any] | None = None,
    base: str | None = None,
) -> Comparison:
    """Compare the base and the tuned model of the run in ``training.output_dir`` on ``data.eval``.

    Writes ``report/summary.json``, ``report/answers.jsonl`` and ``report/report.html`` into the run directory, and
    prints a table, or the summary as JSON.

    Args:
        step: a checkpoint, ``best`` or ``last``; by default the last.
        devices: the devices to use; by default all.
        base: the base model, if it has moved.

    Raises:
        UserError: no such run, nothing to evaluate on, or data that cannot be used.
    """
    say = Announcer(jax.process_index() == 0)
    run = open_run(config.training.output_dir, step, base)
    trained = run.config
    data = dataclasses.replace(config.data, date=config.data.date or trained.data.date)
    config = dataclasses.replace(config, model=trained.model, lora=trained.lora, data=data)
    mesh = check_mesh(config, devices)
    say.mesh(mesh)
    keep_programs(mesh.devices.flat[0])
    opened, arch = open_tuned(run)
    check_heads(arch.attention_specs, mesh)
    task = prepare(config, arch, run.tokenizer, opened.stop_ids)
    say.task(task)
    computed = settle_attention(config, arch, mesh, say)
    split = network_of(computed, arch, mesh, run.trains_embeddings, remat="none")
    say.model(config, split)
    read: dict[str, Words] = {}
    before, frozen = load_weights(split, run.reader, None, opened.arch.vocab_size, trained.training.seed, digests=read)
    if run.reader is not None:
        check_tensors(run.reader, run.tensors, texts(read))
    tuned = unflatten(run.restore(flatten(split.trainable)))
    stops = list(dict.fromkeys([*run.stop_ids, *opened.stop_ids]))
    model = Model(str(run.folder), split, tuned, frozen, run.tokenizer, stops)
    comparison = compare(config, task, model, before)
    if jax.process_index() == 0:
        folder = run.folder.local
        page = write_report(config, folder, run.step, comparison, read_metrics(folder / "metrics.jsonl"), run.tokenizer)
        run.folder.push(last=True)
        if as_json:
            print(json.dumps(comparison.summary))
        else:
            print(table.as_text(comparison))
            say("report", f"{run.folder}/{page.relative_to(folder)}")
    return comparison
