"""Whether a config describes the run that a checkpoint belongs to."""

from __future__ import annotations

from typing import Any

from sft_jax import config_file as configs
from sft_jax.errors import UserError
from sft_jax.hf.reader import is_same_model
from sft_jax.tree import flatten

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
    "training.early_stopping",
    "training.deterministic",
    "training.tensorboard",
    "training.wandb_project",
    "training.mlflow_experiment",
    "training.trackio_project",
    "training.run_name",
    "data.eval",
    "evaluation.",
    "model.remat",
    "training.num_microbatches",
    "mesh.",
)


def check_same_run(run: object, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to the current config, data and base model.

    Args:
        run: the name of the run, for error messages.
        saved, current: ``config`` as nested dicts, and the fingerprints ``data`` and ``base``.

    Raises:
        UserError: names the first key that differs.
    """
    if (changed := changed_key(saved, current["config"])) is not None:
        key, before, now = changed
        hint = (
            f"; its learning rate schedule has a fixed number of steps: to train further, start a new run with "
            f"training.continue_from={run} and another training.output_dir"
            if key in ("training.max_steps", "training.num_train_epochs")
            else ""
        )
        raise UserError(
            f"{run}: holds a run with {key}={before!r}, but the config has {now!r}; "
            f"restore the value, or use another training.output_dir{hint}"
        )
    for key, name in (("data", "training data"), ("base", "base model")):
        same = is_same_model(saved[key], current[key]) if key == "base" else saved[key] == current[key]
        if not same:
            raise UserError(f"{run}: the {name} has changed since this run began; use another training.output_dir")


def changed_key(saved: dict[str, Any], config: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Returns the first key that a config and that of a checkpoint differ in, and both values; None if there is none.

    Keys that change no trained weights are not compared. A key that an earlier version did not have was at its default.

    Args:
        saved: what was saved with the checkpoint.
    """
    unused = ["training.output_dir=unused"]  # not compared, but required
    before, now = (
        {".".join(path): value for path, value in flatten(configs.to_dict(configs.from_dict(one, unused))).items()}
        for one in (saved["config"], config)
    )
    for one in (before, now):  # labels are names in metrics
        one["data.train"] = [{**source, "label": None} for source in one["data.train"]]
    for key in sorted(before.keys() | now.keys()):
        if key == "optimizer.spike_guard" and before.get(key) and now.get(key):
            continue  # a run that stopped at a spike resumes without it
        is_path = key in ("model.path", "model.revision") and saved["base"] != "random"  # the weights are compared
        if not key.startswith(_FREE_KEYS) and not is_path and before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None
