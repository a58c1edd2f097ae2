"""The start of a run: the network and its weights, the optimizer, and the state of a checkpoint or a fresh one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from sft_jax import config_file as configs
from sft_jax.assembly import Model, network_of, step_of
from sft_jax.data.batches.loader import Loader
from sft_jax.data.batches.streaming import StreamLoader, stream
from sft_jax.data.tokens.examples import Examples
from sft_jax.distributed.processes import LONG_WAIT_SECONDS, gather
from sft_jax.errors import UserError
from sft_jax.hf.hub import commit_of
from sft_jax.hf.untrained import chat_tokens, untrained_rows
from sft_jax.models.attention.backend import check_backend
from sft_jax.run.announce import Announcer
from sft_jax.run.prepare import Inputs
from sft_jax.store.checkpoint import Checkpoints, check_same_run
from sft_jax.training.optimizer import labels_of, make_optimizer
from sft_jax.training.state import TrainState, abstract_state, make_state, state_shardings
from sft_jax.training.step import TrainStep
from sft_jax.training.weights import load_weights


@dataclass
class Session:
    """A run under way.

    Attributes:
        model: the network, with the weights that the run started from.
        state: after the newest step.
        make_step: the jitted step with a rematerialisation policy and a number of microbatches.
        identity: what the state belongs to; it is compared before a checkpoint is resumed.
        positions: in the data, after each of the last few steps.
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
        """Begin to save the state after a step."""
        position = self.loader.whole_state(self.positions[step])
        self.checkpoints.save(step, self.state, position, self.identity, eval_loss)


def num_groups(examples: Examples) -> int:
    """How many sources have their losses told apart: none where there is only one."""
    return len(examples.groups) if len(examples.groups) > 1 else 0


def start(inputs: Inputs, say: Announcer) -> Session:
    """Load the weights, make the run directory, and resume where it has a checkpoint.

    Raises:
        UserError: weights that do not fit, a run directory of another config, or one that processes do not share.
    """
    config, mesh, base = inputs.config, inputs.mesh, inputs.base
    network = partial(network_of, config, inputs.arch, mesh, inputs.trains_embeddings)

    # -- model --------------------------------------------------------------------------------------------------------
    split = network()
    check_backend(split.backend, mesh, inputs.arch.attention_specs)
    say.model(config, split)
    say.optimizer(config.optimizer, split, base.dtype_of_embeddings)
    old_size, seed = base.arch.vocab_size, config.training.seed
    part = "all" if inputs.latest is None else "frozen"
    params, frozen = load_weights(split, base.reader, config.lora, old_size, seed, part)
    model = Model(str(inputs.folder), split, params, frozen, inputs.tokenizer, inputs.stop_ids)
    if base.reader is not None and config.lora is not None and not inputs.trains_embeddings:
        tokens = chat_tokens(inputs.tokenizer, inputs.data.examples.stop_ids)
        say.untrained(inputs.tokenizer, untrained_rows(base.reader, tokens))

    # -- optimizer and step -------------------------------------------------------------------------------------------
    optimizer = make_optimizer(config.optimizer, labels_of(split.trainable, split.labels), seed)
    shardings = state_shardings(split.trainable, optimizer, mesh)
    sources = num_groups(inputs.data.examples)

    def make_step(remat: str, num_microbatches: int) -> TrainStep:
        return step_of(config, network(remat), optimizer, inputs.total_steps, shardings, sources, num_microbatches)

    # -- run directory ------------------------------------------------------------------------------------------------
    _begin_folder(inputs)
    training = config.training
    folder = inputs.folder
    checkpoints = Checkpoints(folder.checkpoints, training.keep_checkpoints, training.keep_best, training.keep_every)
    loader, data = _loader(inputs)
    identity = {
        "config": configs.to_dict(config),
        "data": data,
        "base": base.reader.fingerprint() if base.reader else "random",
        "commit": commit_of(base.folder),
        "stop_ids": list(inputs.data.examples.stop_ids),
        "vocab_size": inputs.arch.vocab_size,
    }

    # -- state --------------------------------------------------------------------------------------------------------
    if inputs.latest is not None:
        check_same_run(folder, checkpoints.run(inputs.latest), identity)
        state, position = checkpoints.restore(inputs.latest, abstract_state(split.trainable, optimizer, mesh))
        loader.set_state(position)
        say("resume", f"at step {inputs.latest} of {inputs.total_steps}")
    else:
        state = make_state(params, optimizer, mesh)
    positions = {int(state.step): loader.get_state()}
    return Session(model.with_params({}), state, make_step, loader, checkpoints, identity, positions)


def _begin_folder(inputs: Inputs) -> None:
    """Make the run directory, with the resolved config and the tokenizer."""
    folder = inputs.folder
    if jax.process_index() == 0:
        folder.begins()
        if inputs.latest is None:
            inputs.tokenizer.save_pretrained(folder.local / "tokenizer")
            configs.save(inputs.config, folder.local / "config.yaml")
        folder.push()
    gather("the run directory", wait=LONG_WAIT_SECONDS)
    if not folder.is_shared():
        raise UserError(
            f"training.output_dir: {folder} is not the directory that process 0 sees; all need the same one"
        )


def _loader(inputs: Inputs) -> tuple[Loader | StreamLoader, str]:
    """The batches, and the fingerprint of their data."""
    config, examples = inputs.config, inputs.data.examples
    if inputs.plan is not None:
        loader = Loader(examples, inputs.plan, inputs.mesh, config.training.batch_size)
        return loader, examples.fingerprint()
    found = stream(config, inputs.data.encoder, examples.groups, inputs.mesh, inputs.base.arch.max_positions)
    return found, f"{examples.fingerprint()}, {found.sizes}"
