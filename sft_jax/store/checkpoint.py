"""Checkpoints in orbax: trainable parameters, optimizer state, data position and config, saved atomically per step."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers
from orbax.checkpoint.utils import checkpoint_steps

from sft_jax.errors import Unreachable, UserError
from sft_jax.files.digests import array_digests, named, text_digest
from sft_jax.files.flush import flush_all
from sft_jax.outside_faults import is_of_the_machine
from sft_jax.progress import Work
from sft_jax.training.state import TrainState
from sft_jax.tree import Path as LeafPath
from sft_jax.tree import flatten, unflatten

_NETWORK = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|UNAUTHENTICATED|CANCELLED)\b"
)  # of the storage library

_HANDLERS = {
    "params": ocp.StandardCheckpointHandler,
    "optimizer": ocp.StandardCheckpointHandler,
    "data": ocp.JsonCheckpointHandler,
    "run": ocp.JsonCheckpointHandler,
}


class DamagedError(Exception):
    """The checkpoint of a step does not hold what was saved."""

    def __init__(self, step: int, reason: str):
        self.step = step
        super().__init__(f"the checkpoint of step {step} is damaged: {reason}")


@contextmanager
def reading(step: int) -> Iterator[None]:
    """Turns what the checkpoint library raises for files that were changed or are missing into one error.

    For such files it raises anything, also a plain ``Exception``. What the machine or the network is to blame for is no
    damage: a checkpoint that cannot be read now must not be set aside.
    """
    try:
        yield
    except Exception as error:
        if is_of_the_machine(error):
            raise
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if _NETWORK.search(str(error)):
            raise Unreachable(f"the checkpoint of step {step} cannot be read now: {text}") from error
        raise DamagedError(step, f"it cannot be read ({text})") from error


def _flush_unnamed(folder: epath.Path) -> None:
    """Wait until a checkpoint that is written, but has not got its name yet, is on the disk; called by orbax."""
    for unnamed in () if "://" in str(folder) else Path(folder).glob("*.orbax-checkpoint-tmp*"):
        flush_all(unnamed)


@cache
def _leave_out_repeated_errors() -> None:
    """Keeps orbax from also logging, with tracebacks, the errors that it raises."""
    logging.getLogger("absl").addFilter(lambda one: not ("orbax" in one.pathname and one.exc_info))


class Checkpoints:
    """The ``checkpoints/`` folder of a run. Saving is asynchronous and atomic.

    Several processes open the same folder, and each writes and reads the shards of its own devices. A checkpoint can be
    restored with another number of processes and on another mesh.

    Args:
        keep: keeps the newest N checkpoints.
        keep_best: also keeps the N checkpoints with the lowest held-out loss.
        keep_every: also keeps a checkpoint every N steps.
    """

    def __init__(self, folder: epath.Path, keep: int = 2, keep_best: int = 0, keep_every: int | None = None):
        _leave_out_repeated_errors()
        policies: list[managers.PreservationPolicy] = [managers.LatestN(keep)]
        if keep_best:
            policies.append(
                managers.BestN(
                    get_metric_fn=lambda metrics: metrics["eval_loss"],
                    reverse=True,  # sorts in descending order, of which orbax keeps the last
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        if keep_every:
            policies.append(managers.EveryNSteps(keep_every))
        self._policy = managers.AnyPreservationPolicy(policies)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            # The policy decides what is kept; without best_fn, orbax does not save and restore metrics.
            best_fn=(lambda metrics: metrics["eval_loss"]) if keep_best else None,
            best_mode="min",
            create=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=partial(_flush_unnamed, folder)),
        )
        handlers = {name: handler() for name, handler in _HANDLERS.items()}
        self._manager = ocp.CheckpointManager(folder, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """All steps with a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: TrainState,
        data: dict[str, Any],
        run: dict[str, Any],
        eval_loss: float | None = None,
    ) -> None:
        """Start to save a checkpoint; does nothing if the step is already saved.

        Args:
            data: the data position.
            run: the config and fingerprints of the run, which are compared before the checkpoint is restored.
            eval_loss: the held-out loss of this step, if it was measured.

        Raises:
            UserError: not enough disk space.
        """
        if step in self.steps():
            return
        self._check_disk_space(step, state)
        optimizer = _without_params(state)
        digests = array_digests(named(state.params, "params") | named(optimizer, "optimizer"))
        run = run | {"digests": digests | {"data": text_digest(data)}}
        run["digests"]["run"] = text_digest(run)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),  # type: ignore[call-arg]
            optimizer=ocp.args.StandardSave(optimizer),  # type: ignore[call-arg]
            data=ocp.args.JsonSave(data),  # type: ignore[call-arg]
            run=ocp.args.JsonSave(run),  # type: ignore[call-arg]
        )
        self._manager.save(step, args=items, metrics=None if eval_loss is None else {"eval_loss": eval_loss})

    def _check_disk_space(self, step: int, state: TrainState) -> None:
        """Check that the new checkpoint fits beside the old ones, which orbax removes only afterwards."""
        if "://" in str(self._manager.directory):
            return
        self.wait()
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._manager.directory).free
        if free < needed:
            steps = self.steps()
            raise UserError(
                f"{self._manager.directory}: the checkpoint of step {step} needs {needed / 1e6:,.0f} MB, but only "
                f"{free / 1e6:,.0f} MB are free; free some space and run the same command again; "
                + (f"it resumes from step {steps[-1]}" if steps else "it starts from the beginning")
            )

    def remove_superseded(self) -> None:
        """Remove checkpoints that a killed process had to remove, of which it may have left parts."""
        saved = [_Saved(step, self._manager.metrics(step)) for step in self.steps()]
        kept = self._policy.should_preserve(saved, context=managers.PreservationContext())  # type: ignore[arg-type]
        for one, is_kept in zip(saved, kept, strict=True):
            if not is_kept:
                self._manager.delete(one.step)

    def restore(
        self, step: int, abstract: TrainState, digests: Mapping[str, str] | None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Restore the state and data position of a step, in the shapes and shardings of ``abstract``.

        Args:
            digests: those of :meth:`run`; None in checkpoints of version 0.1.

        Raises:
            DamagedError: a value is not what was saved.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),  # type: ignore[call-arg]
            optimizer=ocp.args.StandardRestore(_without_params(abstract)),  # type: ignore[call-arg]
            data=ocp.args.JsonRestore(),
        )
        with reading(step), Work("restoring", of=f"the checkpoint of step {step}"):
            restored = self._manager.restore(step, args=items)
        params, optimizer, data = (restored[name] for name in ("params", "optimizer", "data"))
        if digests is not None:
            check_arrays(step, digests, named(params, "params") | named(optimizer, "optimizer"))
            if digests["data"] != text_digest(data):
                raise DamagedError(step, "the data position is not what was saved")
        return TrainState(params=params, **optimizer), data

    def trained(self, step: int) -> dict[LeafPath, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the trainable parameters of a step.

        Raises:
            DamagedError: a file cannot be read.
        """
        with reading(step):  # not through the manager, which would read the metadata of the optimizer too
            metadata = ocp.PyTreeCheckpointHandler().metadata(
                epath.Path(self._manager.directory) / str(step) / "params"
            )
            leaves = flatten(dict(metadata.tree))
        return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}

    def run(self, step: int) -> dict[str, Any]:
        """The config and fingerprints that were saved with a step, and the digests of all of it.

        Raises:
            DamagedError: it is not what was saved.
        """
        with reading(step):
            run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        if "digests" in run:  # none in checkpoints of version 0.1
            digests = dict(run["digests"])
            saved = digests.pop("run", None)
            if saved != text_digest(run | {"digests": digests}):
                raise DamagedError(step, "the description of the run is not what was saved")
        return run

    def wait(self) -> None:
        """Wait until all checkpoints are written."""
        with Work("saving", of="the last checkpoint"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until all checkpoints are written, and close the manager."""
        self.wait()
        self._manager.close()


@dataclass(frozen=True)
class _Saved:
    """A checkpoint as the policies of orbax see it."""

    step: int
    metrics: dict[str, Any] | None


def _without_params(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "halted": state.halted}


def check_arrays(step: int, digests: Mapping[str, str], arrays: Mapping[str, jax.Array]) -> None:
    """Compares arrays with the digests that were saved with them.

    Raises:
        DamagedError: names the first that differs.
    """
    for name, digest in array_digests(arrays).items():
        if digests.get(name) != digest:
            raise DamagedError(step, f"{name} is not what was saved")


def restore_leaves(
    folder: epath.Path, step: int, abstract: Mapping[LeafPath, jax.ShapeDtypeStruct]
) -> dict[LeafPath, jax.Array]:
    """Restore some trainable parameters of a step in the dtypes and shardings of ``abstract``; reads no others.

    All processes that hold shards of these parameters must call this together.

    Raises:
        DamagedError: a file cannot be read.
    """
    if not abstract:
        return {}
    tree = unflatten(dict(abstract))
    arguments = ocp.args.PyTreeRestore(  # type: ignore[call-arg]
        item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
    )
    with reading(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return flatten(checkpointer.restore(folder / str(step) / "params", args=arguments))


def latest_step(folder: epath.Path) -> int | None:
    """The newest complete step of a ``checkpoints/`` folder; None if there is no step or no folder.

    Unlike :class:`Checkpoints`, one process can call this alone.
    """
    return max(checkpoint_steps(folder), default=None) if folder.is_dir() else None
