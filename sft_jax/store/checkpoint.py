"""Checkpoints in orbax: trainable parameters, optimizer state, data position and config, saved atomically per step."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers
from orbax.checkpoint.utils import checkpoint_steps

from sft_jax.errors import UserError
from sft_jax.hf.reader import is_same_model
from sft_jax.training.state import TrainState
from sft_jax.tree import Path as LeafPath
from sft_jax.tree import flatten, unflatten

# A run resumes only with the same config, except for these keys, which do not change the trained weights.
_FREE_KEYS = (
    "data.cache",
    "data.num_workers",
    "training.output_dir",
    "training.eval_every",
    "training.save_every",
    "training.log_every",
    "training.keep_checkpoints",
    "training.keep_best",
    "training.keep_every",
    "training.tensorboard",
    "training.wandb_project",
    "data.eval",
    "evaluation.",
    "model.remat",
    "training.num_microbatches",
    "mesh.",
)

_HANDLERS = {
    "params": ocp.StandardCheckpointHandler,
    "optimizer": ocp.StandardCheckpointHandler,
    "data": ocp.JsonCheckpointHandler,
    "run": ocp.JsonCheckpointHandler,
}


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
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            # The policy decides what is kept; without best_fn, orbax does not save and restore metrics.
            best_fn=(lambda metrics: metrics["eval_loss"]) if keep_best else None,
            best_mode="min",
            create=True,
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
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),  # type: ignore[call-arg]
            optimizer=ocp.args.StandardSave(_without_params(state)),  # type: ignore[call-arg]
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

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restore the state and data position of a step, in the shapes and shardings of ``abstract``."""
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),  # type: ignore[call-arg]
            optimizer=ocp.args.StandardRestore(_without_params(abstract)),  # type: ignore[call-arg]
            data=ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(step, args=items)
        return TrainState(params=restored["params"], **restored["optimizer"]), restored["data"]

    def trained(self, step: int) -> dict[LeafPath, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the trainable parameters of a step."""
        leaves = flatten(dict(self._manager.item_metadata(step)["params"].tree))
        return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}

    def run(self, step: int) -> dict[str, Any]:
        """The config and fingerprints that were saved with a step."""
        return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]

    def wait(self) -> None:
        """Wait until all checkpoints are written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until all checkpoints are written, and close the manager."""
        self._manager.wait_until_finished()
        self._manager.close()


def _without_params(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "halted": state.halted}


def restore_leaves(
    folder: epath.Path, step: int, abstract: Mapping[LeafPath, jax.ShapeDtypeStruct]
) -> dict[LeafPath, jax.Array]:
    """Restore some trainable parameters of a step in the dtypes and shardings of ``abstract``; reads no others.

    All processes that hold shards of these parameters must call this together.
    """
    if not abstract:
        return {}
    tree = unflatten(dict(abstract))
    arguments = ocp.args.PyTreeRestore(  # type: ignore[call-arg]
        item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return flatten(checkpointer.restore(folder / str(step) / "params", args=arguments))


def latest_step(folder: epath.Path) -> int | None:
    """The newest complete step of a ``checkpoints/`` folder; None if there is no step or no folder.

    Unlike :class:`Checkpoints`, one process can call this alone.
    """
    return max(checkpoint_steps(folder), default=None) if folder.is_dir() else None


def check_same_run(run: object, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to the current config, data and base model.

    Args:
        run: the name of the run, for error messages.
        saved, current: ``config`` as nested dicts, and the fingerprints ``data`` and ``base``.

    Raises:
        UserError: names the first key that differs.
    """
    before, now = ({".".join(path): v for path, v in flatten(one["config"]).items()} for one in (saved, current))
    for key in sorted(before.keys() | now.keys()):
        is_path = (
            key in ("model.path", "model.revision") and saved["base"] != "random"
        )  # the weights are compared below
        if not key.startswith(_FREE_KEYS) and not is_path and before.get(key) != now.get(key):
            hint = (
                "; its learning rate schedule has a fixed number of steps: to train further, start a new run from its "
                "export (lora.init_from or model.path)"
                if key in ("training.max_steps", "training.num_train_epochs")
                else ""
            )
            raise UserError(
                f"{run}: holds a run with {key}={before.get(key)!r}, but the config has {now.get(key)!r}; "
                f"restore the value, or use another training.output_dir{hint}"
            )
    for key, name in (("data", "training data"), ("base", "base model")):
        same = is_same_model(saved[key], current[key]) if key == "base" else saved[key] == current[key]
        if not same:
            raise UserError(f"{run}: the {name} has changed since this run began; use another training.output_dir")
