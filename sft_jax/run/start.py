"""Starts a run: builds the network and the optimizer, loads weights, and restores or initializes the state."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from sft_jax import config_file as configs
from sft_jax.assembly import Model, network_of
from sft_jax.data.batches.loader import Loader
from sft_jax.data.batches.streaming import StreamLoader, stream
from sft_jax.data.tokens.examples import Examples
from sft_jax.distributed.processes import LONG_WAIT_SECONDS, broadcast, gather
from sft_jax.errors import UserError
from sft_jax.files.digests import Words, folder_digests, texts
from sft_jax.files.flush import flush_all, write_whole
from sft_jax.hf.hub import commit_of
from sft_jax.hf.load import outside_tensors
from sft_jax.hf.untrained import chat_tokens, untrained_tokens
from sft_jax.hf.verify import check_files, check_tensors, file_digests
from sft_jax.run.announce import Announcer
from sft_jax.run.attention import settle_attention
from sft_jax.run.continued import continued_optimizer, continued_params, open_continued
from sft_jax.run.prepare import Inputs
from sft_jax.store.checkpoint import Checkpoints, DamagedError, latest_step
from sft_jax.store.same_run import check_same_run
from sft_jax.training.optimizer import labels_of, make_optimizer
from sft_jax.training.state import TrainState, abstract_state, make_state, state_shardings
from sft_jax.training.step import TrainStep, step_of
from sft_jax.training.weights import load_weights


@dataclass
class Session:
    """A run in progress.

    Attributes:
        model: the network and its frozen parameters.
        state: the state after the newest step.
        make_step: makes the jitted train step for a rematerialization policy and a number of microbatches.
        identity: the config and the fingerprints of data and base model, compared before a run resumes.
        positions: the data position after each of the last few steps.
    """

    model: Model
    state: TrainState
    make_step: Callable[[str, int], TrainStep]
    loader: Loader | StreamLoader
    checkpoints: Checkpoints
    identity: dict[str, Any]
    positions: dict[int, dict[str, Any]]

    @property
    def first_step(self) -> int:
        """The step that the run starts or resumes from."""
        return min(self.positions)

    def save(self, step: int, eval_loss: float | None = None) -> None:
        """Start to save the state after a step."""
        position = self.loader.merge_states(self.positions[step])
        self.checkpoints.save(step, self.state, position, self.identity, eval_loss)


def num_groups(examples: Examples) -> int:
    """The number of sources whose losses are reported separately: 0 if there is only one source."""
    return len(examples.groups) if len(examples.groups) > 1 else 0


def start(inputs: Inputs, say: Announcer) -> Session:
    """Load the weights, make the run directory, and resume from its latest checkpoint, if any.

    Raises:
        UserError: weights that do not match, a run directory of another config, one that not all processes share,
            or one that is in use.
        DamagedError: the latest checkpoint is not what was saved.
    """
    config, mesh, base = inputs.config, inputs.mesh, inputs.base

    # -- model --------------------------------------------------------------------------------------------------------
    computed = settle_attention(config, inputs.arch, mesh, say)
    network = partial(network_of, computed, inputs.arch, mesh, inputs.trains_embeddings)
    split = network()
    say.model(config, split)
    if base.reader is not None:
        say.outside(base.arch, outside_tensors(base.reader, base.arch))
    say.optimizer(config.optimizer, split, base.dtype_of_embeddings)
    old_size, seed = base.arch.vocab_size, config.training.seed
    part = "all" if inputs.latest is None else "frozen"
    read: dict[str, Words] = {}
    params, frozen = load_weights(split, base.reader, config.lora, old_size, seed, part, digests=read)
    continued = None
    if inputs.latest is None and config.training.continue_from is not None:
        continued = open_continued(config.training.continue_from, base.reader)
        params = continued_params(continued, split)
        kept = " and its optimizer state" if config.training.continue_optimizer else ", a new optimizer state"
        say("continued", f"from {continued.folder} at step {continued.step}{kept}, a new schedule")
    model = Model(str(inputs.folder), split, params, frozen, inputs.tokenizer, inputs.stop_ids)
    if base.reader is not None and config.lora is not None and not inputs.trains_embeddings:
        tokens = chat_tokens(inputs.tokenizer, inputs.data.examples.stop_ids)
        say.untrained(inputs.tokenizer, untrained_tokens(base.reader, base.arch.embeddings_tensor, tokens))

    # -- optimizer and step -------------------------------------------------------------------------------------------
    optimizer = make_optimizer(config.optimizer, labels_of(split.trainable, split.labels), seed)
    shardings = state_shardings(split.trainable, optimizer, mesh)
    num_sources = num_groups(inputs.data.examples)

    def make_step(remat: str, num_microbatches: int) -> TrainStep:
        return step_of(config, network(remat), optimizer, inputs.total_steps, shardings, num_sources, num_microbatches)

    # -- run directory ------------------------------------------------------------------------------------------------
    if _create_directory(inputs, say):
        say("restart", "an earlier start saved no checkpoint here; this one begins at step 0, and replaces its metrics")
    training = config.training
    checkpoints = Checkpoints(
        inputs.folder.checkpoints, training.keep_checkpoints, training.keep_best, training.keep_every
    )
    loader, data = _loader(inputs)
    identity = {
        "config": configs.to_dict(config),
        "data": data,
        "base": base.reader.fingerprint() if base.reader else "random",
        "commit": commit_of(base.folder),
        "files": file_digests(base.folder),
        "tensors": texts(read),
        "stop_ids": list(inputs.data.examples.stop_ids),
        "vocab_size": inputs.arch.vocab_size,
    }

    # -- state --------------------------------------------------------------------------------------------------------
    if inputs.latest is not None:
        try:
            state, position = _restore(
                inputs, checkpoints, identity, abstract_state(split.trainable, optimizer, mesh), say
            )
        except DamagedError:
            checkpoints.close()
            raise
        loader.set_state(position)
        say("resume", f"at step {inputs.latest} of {inputs.total_steps}")
    else:
        state = make_state(params, optimizer, mesh)
        if continued is not None and training.continue_optimizer:
            opt_state = continued_optimizer(continued, split.trainable, optimizer, mesh)
            state = dataclasses.replace(state, opt_state=opt_state)
        identity["tokenizer"] = _tokenizer_files(inputs, None, say)
    positions = {int(state.step): loader.get_state()}
    return Session(model.with_params({}), state, make_step, loader, checkpoints, identity, positions)


def _restore(
    inputs: Inputs, checkpoints: Checkpoints, identity: dict[str, Any], abstract: TrainState, say: Announcer
) -> tuple[TrainState, dict[str, Any]]:
    """The state and data position to resume from; completes the identity of the run.

    Raises:
        UserError: the checkpoint belongs to another config, base model or data.
        DamagedError: it is not what was saved.
    """
    base = inputs.base
    assert inputs.latest is not None
    saved = checkpoints.run(inputs.latest)
    check_same_run(inputs.folder, saved, identity)
    check_files(base.folder, saved.get("files", {}), identity["files"])
    if base.reader is not None:
        check_tensors(base.reader, saved.get("tensors", {}), identity["tensors"])
        identity["tensors"] |= saved.get("tensors", {})  # trained weights are not read from the base again
    identity["tokenizer"] = _tokenizer_files(inputs, saved.get("tokenizer"), say)
    restored = checkpoints.restore(inputs.latest, abstract, saved.get("digests"))
    checkpoints.remove_superseded()
    return restored


def _create_directory(inputs: Inputs, say: Announcer) -> bool:
    """Create the run directory with the resolved config and the tokenizer.

    Returns:
        Whether a run started here before and saved no checkpoint; other processes than 0 may not see that.
    """
    folder = inputs.folder
    began = inputs.latest is None and (folder.local / "config.yaml").is_file()
    if jax.process_index() == 0:
        folder.create()
        if latest_step(folder.checkpoints) != inputs.latest:
            raise UserError(f"training.output_dir: another process trained in {folder} just now; run the command again")
        if inputs.latest is None:
            inputs.tokenizer.save_pretrained(folder.local / "tokenizer")
            flush_all(folder.local / "tokenizer")
        if inputs.latest is None or not _has_config(folder.local):
            write_whole(folder.local / "config.yaml", configs.to_yaml(inputs.config))
            if inputs.latest is not None:
                say("damage", f"{folder}/config.yaml was damaged or gone; it is written again")
        folder.push()
    gather("the run directory", wait=LONG_WAIT_SECONDS)
    if not folder.is_shared():
        raise UserError(
            f"training.output_dir: {folder} is not the directory of process 0; use one that all hosts share"
        )
    return began


def _has_config(run: Path) -> bool:
    try:
        configs.load(run / "config.yaml")
    except UserError:
        return False
    return True


def _tokenizer_files(inputs: Inputs, saved: dict[str, str] | None, say: Announcer) -> dict[str, str]:
    """The digests of the tokenizer's files in the run directory; writes the files again if they differ from ``saved``.

    They are for whoever uses the run; the run itself uses the tokenizer of its base model.
    """
    folder = inputs.folder.local / "tokenizer"
    digests: dict[str, str] = {}
    if jax.process_index() == 0:
        digests = folder_digests(folder)
        if saved is not None and digests != saved:
            inputs.tokenizer.save_pretrained(folder)
            inputs.folder.push()
            say("damage", f"{inputs.folder}/tokenizer was not what the run had written; it is written again")
            digests = folder_digests(folder)
    return json.loads(broadcast("the tokenizer's files", json.dumps(digests)))


def _loader(inputs: Inputs) -> tuple[Loader | StreamLoader, str]:
    """The batches and the fingerprint of their data."""
    config, examples = inputs.config, inputs.data.examples
    if inputs.plan is not None:
        loader = Loader(examples, inputs.plan, inputs.mesh, config.training.batch_size)
        return loader, examples.fingerprint()
    loader = stream(config, inputs.data.encoder, examples.groups, inputs.mesh, inputs.base.arch.max_positions)
    return loader, f"{examples.fingerprint()}, {loader.sizes}"
