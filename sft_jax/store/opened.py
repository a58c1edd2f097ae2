"""Opens a run for reading: its config, trained weights, tokenizer and base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from sft_jax import config_file as configs
from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.files.digests import first_difference, folder_digests, named
from sft_jax.hf.config import file_dtype, read_config
from sft_jax.hf.dequantized import open_weights
from sft_jax.hf.hub import absolute, find_model
from sft_jax.hf.reader import Reader, is_same_model
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.hf.verify import check_files
from sft_jax.models.split import EMBEDDINGS
from sft_jax.store.checkpoint import Checkpoints, DamagedError, check_arrays, restore_leaves
from sft_jax.store.folder import RunDirectory
from sft_jax.store.metrics import read_metrics
from sft_jax.store.same_run import changed_key
from sft_jax.store.steps import Step, choose_step
from sft_jax.tree import Path as LeafPath
from sft_jax.tree import unflatten


@dataclass(frozen=True)
class OpenedRun:
    """A run directory, opened at one checkpoint."""

    folder: RunDirectory
    config: Config
    step: int
    trained: dict[LeafPath, jax.ShapeDtypeStruct]  # shapes and dtypes of the trained parameters
    base: Path  # folder of the base model
    reader: Reader | None  # None if the base was initialized at random, and all weights were trained
    fingerprint: str | None  # fingerprint of the base weights
    tokenizer: Any
    stop_ids: list[int]  # stop token ids in the training data, the most frequent first
    vocab_size: int  # vocabulary size of the trained network, including added tokens
    digests: Mapping[str, str] | None  # of the arrays of the checkpoint; None in those of version 0.1
    tensors: Mapping[str, str]  # digests of the tensors of the base that the run began with; none in version 0.1
    other_steps: list[int]  # that have a checkpoint too

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor in the base model's files."""
        if self.reader is not None:
            return self.reader.dtype(name)
        dtypes = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
        return np.dtype(dtypes[file_dtype(read_config(self.base))])

    @property
    def trains_embeddings(self) -> bool:
        """Whether the embeddings and ``lm_head`` were trained together with adapters."""
        return self.config.lora is not None and any(path[0] in EMBEDDINGS for path in self.trained)

    def restore(self, abstract: Mapping[LeafPath, jax.ShapeDtypeStruct]) -> dict[LeafPath, jax.Array]:
        """Restore trained parameters in the dtypes and shardings of ``abstract``.

        Raises:
            UserError: they are not what was saved.
        """
        as_saved = {path: one for path, one in abstract.items() if one.dtype == self.trained[path].dtype}
        groups = [as_saved, *({path: one} for path, one in abstract.items() if path not in as_saved)]
        restored: dict[LeafPath, jax.Array] = {}
        for group in groups:  # values are compared as they were saved, and converted one array at a time
            saved = {
                path: jax.ShapeDtypeStruct(one.shape, self.trained[path].dtype, sharding=one.sharding)
                for path, one in group.items()
            }
            try:
                leaves = restore_leaves(self.folder.checkpoints, self.step, saved)
                if self.digests is not None:
                    check_arrays(self.step, self.digests, named(unflatten(leaves), "params"))
            except DamagedError as error:
                raise damaged(self.folder, error, self.other_steps) from error
            restored |= {path: leaf.astype(group[path].dtype) for path, leaf in leaves.items()}
        return {path: restored[path] for path in abstract}


def open_run(name: str | Path | RunDirectory, step: Step = None, base: str | None = None) -> OpenedRun:
    """Open a run directory.

    Args:
        name: a path, the URL of a bucket, or an opened directory.
        step: a checkpoint, ``best`` or ``last``; by default the last.
        base: the base model, if it has moved; its weights must be the same.

    Raises:
        UserError: not a run directory, no (such) checkpoint, or a damaged one; config.yaml was changed; the base model
            is missing or has changed.
    """
    folder = name if isinstance(name, RunDirectory) else RunDirectory(str(name))
    if not folder.is_run():
        raise UserError(f"{folder}: not a run directory; it has no config.yaml or no checkpoints")
    config = configs.load(folder.local / "config.yaml")
    checkpoints = Checkpoints(folder.checkpoints, config.training.keep_checkpoints)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"{folder}: has no checkpoint yet")
        step = choose_step(folder, step, steps, read_metrics(folder.local / "metrics.jsonl"))
        others = [one for one in steps if one != step]
        try:
            identity, trained = checkpoints.run(step), checkpoints.trained(step)
        except DamagedError as error:
            raise damaged(folder, error, others) from error
        if (changed := changed_key(identity, configs.to_dict(config))) is not None:
            key, before, now = changed
            raise UserError(
                f"{folder}/config.yaml: has {key}={now!r}, but the run was trained with {before!r}; restore the value"
            )
        if base is not None:
            moved = dataclasses.replace(config.model, path=absolute(base), revision=None)
            config = dataclasses.replace(config, model=moved)
        revision = config.model.revision if base is not None else identity.get("commit") or config.model.revision
        model = find_model(
            config.model.path, revision, "--base" if base else f"{folder}: model.path (--base if it moved)"
        )
        check_files(model, identity.get("files", {}))
        reader = open_weights(model) if config.model.init == "pretrained" else None
        fingerprint = None if reader is None else reader.fingerprint()
        if fingerprint is not None and not is_same_model(identity["base"], fingerprint):
            raise UserError(
                f"{model}: is not the base model that {folder} was trained on: its weights differ; set the right base "
                "model with --base"
            )
    finally:
        checkpoints.close()
    _check_tokenizer(folder, identity.get("tokenizer"))
    tokenizer, _ = load_tokenizer(folder.local / "tokenizer")
    stops, size = identity["stop_ids"], identity["vocab_size"]
    digests, tensors = identity.get("digests"), identity.get("tensors", {})
    return OpenedRun(
        folder, config, step, trained, model, reader, fingerprint, tokenizer, stops, size, digests, tensors, others
    )


def _check_tokenizer(folder: RunDirectory, saved: Mapping[str, str] | None) -> None:
    """Checks that the tokenizer's files are what the run wrote; runs of version 0.1 do not say."""
    if saved is None:
        return
    if (name := first_difference(saved, folder_digests(folder.local / "tokenizer"))) is not None:
        raise UserError(
            f"{folder}/tokenizer/{name}: is not what the run wrote; restore it, or run sft-jax train with the "
            "config of the run, which writes it again"
        )


def damaged(folder: RunDirectory, error: DamagedError, others: list[int]) -> UserError:
    """The error for a checkpoint that cannot be used, which names those that can be tried."""
    way_out = f"use --step {others[-1]}" if others else "it has no other checkpoint"
    return UserError(f"{folder}: {error}; {way_out}")
