"""Runs training from a config to a run directory: prepare, start, loop, finish."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import jax

from sft_jax.config import Config
from sft_jax.distributed.preemption import Preemption
from sft_jax.errors import Preempted, Stopped
from sft_jax.outside_faults import naming
from sft_jax.run.announce import Announcer
from sft_jax.run.due import tasks_of
from sft_jax.run.early_stopping import early_stopping
from sft_jax.run.finish import finish, stop_halted, what_is_saved
from sft_jax.run.prepare import Inputs, prepare
from sft_jax.run.recorder import Callback, Halted, Recorder
from sft_jax.run.resume import set_aside
from sft_jax.run.start import Session, start
from sft_jax.store.checkpoint import DamagedError
from sft_jax.training.compilation import Steps, fit_options


def train(config: Config, devices: Sequence[Any] | None = None, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Start or resume the run that ``config`` describes; returns the last metrics.

    Args:
        devices: the devices to use; by default all.
        callbacks: process 0 calls them with the kind of an event, its step and its metrics.

    Raises:
        UserError: anything wrong with config, model, data or run directory; these are checked before anything is
            written.
        Preempted: the machine is being preempted, or a callback returned ``"stop"``; the state is saved.
    """
    say = Announcer(jax.process_index() == 0)
    inputs = prepare(config, devices, say)
    try:
        with naming(inputs.folder):
            inputs, session = _start(inputs, say)
        with ExitStack() as until_end:
            with naming(inputs.folder), jax.set_mesh(inputs.mesh), Preemption() as preemption:
                recorder = until_end.enter_context(Recorder(inputs, session.first_step, preemption, callbacks))
                try:
                    last = loop(inputs, session, recorder, preemption, say)
                except Halted as error:
                    raise stop_halted(inputs, session, error) from None
                except KeyboardInterrupt:
                    raise KeyboardInterrupt(what_is_saved(session, recorder.last["step"])) from None
                finally:
                    session.checkpoints.close()
                    recorder.end_loop()
                    if jax.process_index() == 0:
                        inputs.folder.push()
            return finish(inputs, session, recorder, say, last)
    finally:
        inputs.folder.release()


def _start(inputs: Inputs, say: Announcer) -> tuple[Inputs, Session]:
    """Start from the newest checkpoint that is whole; set damaged ones aside."""
    while True:
        try:
            return inputs, start(inputs, say)
        except DamagedError as error:
            inputs = dataclasses.replace(inputs, latest=set_aside(inputs.folder, error, say))


def loop(inputs: Inputs, session: Session, recorder: Recorder, preemption: Preemption, say: Announcer) -> int:
    """Run the remaining steps and the tasks that are due between them; returns the last step.

    Raises:
        Preempted: the run was asked to stop; the state is saved.
        Halted: a loss or gradient is not finite.
    """
    config, mesh, total, first = inputs.config, inputs.mesh, inputs.total_steps, session.first_step
    rule = early_stopping(config.training.early_stopping, inputs.folder.local, inputs.latest)

    def is_asked_to_stop(after: int) -> bool:
        return preemption.requested and after < total

    tasks = tasks_of(inputs, session, recorder, rule, is_asked_to_stop)
    for task in tasks:
        if task.is_due_at_start(inputs) and not is_asked_to_stop(first):
            task.do(first)
    if is_asked_to_stop(first):
        where = "starts again" if inputs.latest is None else f"resumes at step {first}"
        raise _stopped(recorder, f"the same command {where}")
    if first == total or rule.is_reached:
        if inputs.latest is None:  # zero steps: the result is the base model
            session.save(0)
        return first
    batches = iter(session.loader)
    batch = next(batches)
    session.positions[first + 1] = session.loader.get_state()
    train_step = Steps(session.make_step, fit_options(config, mesh), mesh.local_devices[0], say.compiled)
    train_step.prepare(session.state, session.model.frozen, batch, inputs.longest)
    recorder.restart_clock()
    for step in range(first + 1, total + 1):
        session.state, metrics = train_step(session.state, session.model.frozen, batch)
        num_tokens = batch.inputs.size
        if step < total:
            batch = next(batches)
            session.positions[step + 1] = session.loader.get_state()
            session.positions.pop(step - 3, None)
        recorder.started(step, metrics, num_tokens)
        stopping = preemption.reached(step) and step < total
        if any(task.is_due(step, total, stopping) for task in tasks):
            recorder.flush_to_disk()
            inputs.folder.check_held()
            for task in tasks:
                stopping = stopping or is_asked_to_stop(step)  # while the one before ran
                if task.is_due(step, total, stopping):
                    task.do(step)
            recorder.draw()
            if jax.process_index() == 0:
                inputs.folder.push()
            recorder.restart_clock()
        if rule.is_reached:
            recorder.say(step, f"stops early: {rule.reason}")
            session.save(step, rule.loss(step))
            return step
        if stopping:
            session.checkpoints.wait()
            raise _stopped(recorder, f"step {step} is saved; the same command resumes there")
    return total


def _stopped(recorder: Recorder, state: str) -> Preempted:
    kind = Stopped if recorder.stop_requested else Preempted
    return kind(f"asked to stop; {state}")
