"""Ends a run: writes the report, or the reason for a failure."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp

from sft_jax.errors import UserError
from sft_jax.evaluation.compare import compare
from sft_jax.report import table
from sft_jax.report.loss import plot_loss
from sft_jax.report.write import write_report
from sft_jax.run.announce import Announcer
from sft_jax.run.prepare import Inputs
from sft_jax.run.recorder import Halted, Recorder
from sft_jax.run.start import Session
from sft_jax.store.metrics import read_metrics
from sft_jax.training.weights import load_weights


def finish(inputs: Inputs, session: Session, recorder: Recorder, say: Announcer, last: int) -> dict[str, Any]:
    """Draw the loss curve and, with ``evaluation.at_end``, compare with the base model; returns the last metrics.

    Args:
        last: the last step, which is not the last of the plan if the run stopped early.
    """
    config, folder, total = inputs.config, inputs.folder, inputs.total_steps
    is_main = jax.process_index() == 0
    rows = read_metrics(folder.local / "metrics.jsonl") if is_main else []
    if is_main:
        curve = plot_loss(folder.local, rows)
        recorder.drawn(curve)
        of = "" if last == total else f" of {total}, stopped early"
        say("done", f"{last} steps{of}; loss curve in {folder}/{curve.relative_to(folder.local)}")
    if inputs.task is not None:
        tuned = session.model.with_params(session.state.params)
        del session.state  # frees the memory of the optimizer for the base model
        old_size, seed = inputs.base.arch.vocab_size, config.training.seed
        before, _ = load_weights(
            tuned.split, inputs.base.reader, None, old_size, seed, part="trainable", frozen=tuned.frozen
        )
        comparison = compare(config, inputs.task, tuned, before)
        recorder.compared(comparison.summary)
        if is_main:
            page = write_report(config, folder.local, last, comparison, rows, inputs.tokenizer)
            print(table.as_text(comparison), flush=True)
            say("report", f"{folder}/{page.relative_to(folder.local)}")
    if is_main:
        folder.push(last=True)
    recorder.notify("end", last, dict(recorder.last))
    step = " --step best" if last != total else ""
    say("next", f"sft-jax generate {folder} --chat{step}, or sft-jax export {folder} OUT{step}")
    say("", f"to train further: a new run with training.continue_from={folder} and its own training.output_dir")
    return recorder.last


def what_is_saved(session: Session, step: int) -> str:
    """What Ctrl-C leaves, after the checkpoint that is being written is done.

    Args:
        step: the last step whose metrics are written.
    """
    session.checkpoints.wait()
    steps = session.checkpoints.steps()
    way_on = f"step {steps[-1]} is saved, the same command resumes there" if steps else "nothing is saved yet"
    return f"interrupted after step {step}; {way_on}"


def stop_halted(inputs: Inputs, session: Session, error: Halted) -> UserError:
    """Handle a halted run: save the state before the step, list the rows of the batch, and return the error."""
    step, values, folder = error.step, error.values, inputs.folder
    session.state = dataclasses.replace(session.state, halted=jnp.zeros_like(session.state.halted))
    session.save(step - 1)
    session.checkpoints.wait()
    rows = None
    if inputs.plan is not None:
        examples = inputs.data.examples
        rows = [examples.describe(int(i)) for row in inputs.plan.rows_of(step - 1) for i in row]
    name = f"report/{error.reason}_step_{step}.json"
    if jax.process_index() == 0:
        path = folder.local / name
        path.parent.mkdir(exist_ok=True)
        shown = {key: repr(values[key]) for key in ("loss", "grad_norm")}
        path.write_text(json.dumps({"step": step, **shown, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    batch = "rows of a stream, which are not recorded"
    if rows is not None:
        more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
        batch = f"{', '.join(rows[:4])}{more} (all in {folder}/{name})"
    is_spike = error.reason == "spike"
    way_out = "; optimizer.spike_guard=skip resumes there without this update" if is_spike else ""
    return UserError(
        f"step {step}: {'spike: ' if is_spike else ''}loss {values['loss']}, gradient norm {values['grad_norm']}; the "
        f"batch contains {batch}; the previous state is saved as step {step - 1}{way_out}"
    )
