"""Run state in orbax: trainable leaves, optimizer, data position and config, one atomic step each."""

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

# A checkpoint is continued only by the same config; these keys do not change what is computed.
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
    "mesh.",
)

_HANDLERS = {
    "params": ocp.StandardCheckpointHandler,
    "optimizer": ocp.StandardCheckpointHandler,
    "data": ocp.JsonCheckpointHandler,
    "run": ocp.JsonCheckpointHandler,
}


class Checkpoints:
    """The ``checkpoints/`` folder of a run. Saving is asynchronous; a step is there whole or not at all.

    Several processes open the same folder, and each writes and reads the parts that its devices hold; a step can be
    restored by another number of processes, on another mesh.

    Args:
        keep: the last so many.
        keep_best: besides, so many with the lowest held-out loss.
        keep_every: besides, every step that is a multiple of it.
    """

    def __init__(self, folder: epath.Path, keep: int = 2, keep_best: int = 0, keep_every: int | None = None):
        policies: list[managers.PreservationPolicy] = [managers.LatestN(keep)]
        if keep_best:
            policies.append(
                managers.BestN(
                    get_metric_fn=lambda metrics: metrics["eval_loss"],
                    reverse=True,  # the last of the descending order are preserved
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        if keep_every:
            policies.append(managers.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            # Which are kept is the policy's to say; without this, metrics are neither written nor read again.
            best_fn=(lambda metrics: metrics["eval_loss"]) if keep_best else None,
            best_mode="min",
            create=True,
        )
        handlers = {name: handler() for name, handler in _HANDLERS.items()}
        self._manager = ocp.CheckpointManager(folder, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """All complete steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: TrainState,
        data: dict[str, Any],
        run: dict[str, Any],
        eval_loss: float | None = None,
    ) -> None:
        """Begin to save; does nothing where the step is saved already.

        Args:
            data: the data position.
            run: what the state belongs to (config, fingerprints), to be compared before it is restored.
            eval_loss: held-out loss of this step, where it was measured.

        Raises:
            UserError: the disk has no room for it.
        """
        if step in self.steps():
            return
        self._check_room(step, state)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),  # type: ignore[call-arg]
            optimizer=ocp.args.StandardSave(_besides_params(state)),  # type: ignore[call-arg]
            data=ocp.args.JsonSave(data),  # type: ignore[call-arg]
            run=ocp.args.JsonSave(run),  # type: ignore[call-arg]
        )
        self._manager.save(step, args=items, metrics=None if eval_loss is None else {"eval_loss": eval_loss})

    def _check_room(self, step: int, state: TrainState) -> None:
        """What comes after is there before what was is removed, and half a checkpoint is of no use."""
        if "://" in str(self._manager.directory):
            return
        self.wait()
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._manager.directory).free
        if free < needed:
            steps = self.steps()
            raise UserError(
                f"{self._manager.directory}: {free / 1e6:,.0f} MB are free and the checkpoint of step {step} takes "
                f"{needed / 1e6:,.0f}; free some and run the same command again, which goes on "
                + (f"from step {steps[-1]}" if steps else "from the start")
            )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and data position of a step; ``abstract`` has the shapes and the shardings to restore into."""
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),  # type: ignore[call-arg]
            optimizer=ocp.args.StandardRestore(_besides_params(abstract)),  # type: ignore[call-arg]
            data=ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(step, args=items)
        return TrainState(params=restored["params"], **restored["optimizer"]), restored["data"]

    def trained(self, step: int) -> dict[LeafPath, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the trainable leaves of a step."""
        leaves = flatten(dict(self._manager.item_metadata(step)["params"].tree))
        return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}

    def run(self, step: int) -> dict[str, Any]:
        """What a step belongs to."""
        return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]

    def wait(self) -> None:
        """Until everything begun is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait and let go of the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


def _besides_params(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "halted": state.halted}


def restore_leaves(
    folder: epath.Path, step: int, abstract: Mapping[LeafPath, jax.ShapeDtypeStruct]
) -> dict[LeafPath, jax.Array]:
    """Some trainable leaves of a step in the dtypes and shardings given; what is not asked for is not read.

    All processes that hold a part of them ask together.
    """
    if not abstract:
        return {}
    wanted = unflatten(dict(abstract))
    arguments = ocp.args.PyTreeRestore(  # type: ignore[call-arg]
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return flatten(checkpointer.restore(folder / str(step) / "params", args=arguments))


def latest_step(folder: epath.Path) -> int | None:
    """The newest complete step of a ``checkpoints/`` folder; None where there is none, or no folder.

    Unlike :class:`Checkpoints`, it may be asked by one process alone.
    """
    return max(checkpoint_steps(folder), default=None) if folder.is_dir() else None


def check_same_run(run: object, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Whether a checkpoint belongs to the config, data and base model at hand.

    Args:
        run: its name, for people.
        saved, current: ``config`` as nested dicts, ``data`` and ``base`` fingerprints.

    Raises:
        UserError: names the first key that differs.
    """
    before, now = ({".".join(path): v for path, v in flatten(one["config"]).items()} for one in (saved, current))
    for key in sorted(before.keys() | now.keys()):
        moved = key in ("model.path", "model.revision") and saved["base"] != "random"  # what it holds is compared below
        if not key.startswith(_FREE_KEYS) and not moved and before.get(key) != now.get(key):
            way_on = (
                "; its schedule is made for so many steps: to train on, start another run from its export "
                "(lora.init_from or model.path)"
                if key in ("training.max_steps", "training.num_train_epochs")
                else ""
            )
            raise UserError(
                f"{run}: holds a run with {key}={before.get(key)!r}, the config now says {now.get(key)!r}; "
                f"restore it, or name another training.output_dir{way_on}"
            )
    for key, what in (("data", "training data"), ("base", "base model")):
        same = is_same_model(saved[key], current[key]) if key == "base" else saved[key] == current[key]
        if not same:
            raise UserError(f"{run}: the {what} has changed since this run began; name another training.output_dir")
