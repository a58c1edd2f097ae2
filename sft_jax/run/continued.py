"""Begins a run with the trained weights of another, and with its optimizer state if that is wanted."""

from __future__ import annotations

import re
from typing import Any

import optax
from jax.sharding import Mesh

from sft_jax.errors import UserError
from sft_jax.hf.reader import Reader, is_same_model
from sft_jax.models.split import Split
from sft_jax.store.checkpoint import Checkpoints, DamagedError
from sft_jax.store.opened import OpenedRun, open_run
from sft_jax.store.steps import Step
from sft_jax.training.state import abstract_state
from sft_jax.tree import Params, flatten, unflatten

_KEY = "training.continue_from"


def open_continued(name: str, reader: Reader | None) -> OpenedRun:
    """Open the run that ``training.continue_from`` names: ``RUN``, ``RUN@best``, ``RUN@last`` or ``RUN@STEP``.

    Args:
        reader: the base model of the new run.

    Raises:
        UserError: there is no such run or checkpoint, or it has another base model.
    """
    match = re.fullmatch(r"(.+)@(best|last|\d+)", name)
    step: Step = None
    if match is not None:
        name, step = match[1], match[2] if match[2] in ("best", "last") else int(match[2])
    try:
        run = open_run(name, step)
    except UserError as error:
        raise UserError(f"{_KEY}: {error}") from error
    if reader is not None and run.fingerprint is not None and not is_same_model(run.fingerprint, reader.fingerprint()):
        raise UserError(f"{_KEY}: {run.folder} was trained on another base model than model.path")
    return run


def continued_params(run: OpenedRun, split: Split) -> Params:
    """The trained weights of a run for a network.

    Raises:
        UserError: the network trains other weights; names the first.
    """
    wanted = flatten(split.trainable)
    for path in sorted(wanted.keys() | run.trained.keys(), key=str):
        shapes = [None if path not in one else tuple(one[path].shape) for one in (run.trained, wanted)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{_KEY}: {'.'.join(map(str, path))} has the shape {shapes[0]} in {run.folder}, and {shapes[1]} here "
                "(None: it is not trained); give lora and data.added_tokens the values of that run"
            )
    return unflatten(run.restore(wanted))


def continued_optimizer(run: OpenedRun, params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """The optimizer state of a run.

    Raises:
        UserError: it is damaged, or of another optimizer.
    """
    checkpoints = Checkpoints(run.folder.checkpoints)
    try:
        state, _ = checkpoints.restore(run.step, abstract_state(params, optimizer, mesh), run.digests)
    except DamagedError as error:
        raise UserError(
            f"training.continue_optimizer: the optimizer state of {run.folder} is damaged or of another kind than "
            f"optimizer.moments ({error}); set it to false"
        ) from error
    finally:
        checkpoints.close()
    return state.opt_state
