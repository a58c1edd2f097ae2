"""A training run, from a config to a run directory, read from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from sft_jax.config import Config
from sft_jax.distributed.preemption import Preemption
from sft_jax.errors import Preempted, Stopped
from sft_jax.run.announce import Announcer
from sft_jax.run.due import tasks_of
from sft_jax.run.finish import finish, stop_not_finite
from sft_jax.run.prepare import Inputs, prepare
from sft_jax.run.recorder import Callback, NotFinite, Recorder
from sft_jax.run.start import Session, start
from sft_jax.training.compilation import Steps, ways_of


def train(config: Config, devices: Sequence[Any] | None = None, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Run, or resume, the training that ``config`` describes; returns the last metrics.

    Args:
        devices: which to use; by default all there are.
        callbacks: called by process 0 with the kind of an event, its step and its metrics.

    Raises:
        UserError: anything wrong with config, model, data or run directory; nothing is written before these are
            checked.
        Preempted: the machine is about to be taken away, or a callback asked to stop; the state is saved.
    """
    say = Announcer(jax.process_index() == 0)
    inputs = prepare(config, devices, say)
    session = start(inputs, say)
    with jax.set_mesh(inputs.mesh), Preemption() as preemption:
        recorder = Recorder(inputs, session.first_step, preemption, callbacks)
        try:
            loop(inputs, session, recorder, preemption, say)
        except NotFinite as fault:
            raise stop_not_finite(inputs, session, fault) from None
        finally:
            session.checkpoints.close()
            recorder.close()
            if jax.process_index() == 0:
                inputs.folder.push()
    return finish(inputs, session, recorder, say)


def loop(inputs: Inputs, session: Session, recorder: Recorder, preemption: Preemption, say: Announcer) -> None:
    """All steps that are left, and what is due between them.

    Raises:
        Preempted: asked to stop, with the state saved.
        NotFinite: a loss or gradient is not finite.
    """
    config, mesh, total, first = inputs.config, inputs.mesh, inputs.total_steps, session.first_step
    tasks = tasks_of(inputs, session, recorder)
    for task in tasks:
        if task.is_due_at_start(inputs):
            task.do(first)
    if first == total:
        if inputs.latest is None:  # nothing to train: the base model itself is the result
            session.save(0)
        return
    batches = iter(session.loader)
    batch = next(batches)
    session.positions[first + 1] = session.loader.get_state()
    train_step = Steps(session.make_step, ways_of(config, mesh), mesh.local_devices[0], say.compiled)
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
        due = [task for task in tasks if task.is_due(step, total, stopping)]
        if due:
            recorder.catch_up()
            for task in due:
                task.do(step)
            if jax.process_index() == 0:
                inputs.folder.push()
            recorder.restart_clock()
        if stopping:
            session.checkpoints.wait()
            stopped = f"asked to stop; step {step} is saved; the same command resumes there"
            raise Stopped(stopped) if recorder.stops else Preempted(stopped)
