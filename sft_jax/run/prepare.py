"""Reads and checks the inputs of a run before its weights are loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from sft_jax.adapters.attach import method
from sft_jax.assembly import Base, check_mesh, open_base
from sft_jax.config import Config
from sft_jax.data.batches.packing import Plan, plan_of
from sft_jax.data.batches.streaming import first_rows
from sft_jax.data.lint.leave_out import leave_out
from sft_jax.data.read.sources import prepare_to_open
from sft_jax.data.tokens.prepare import Prepared, prepare_data
from sft_jax.errors import UserError
from sft_jax.evaluation.task import Task
from sft_jax.evaluation.task import prepare as prepare_task
from sft_jax.hf.config import media_tokens, read_config
from sft_jax.hf.hub import absolute
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.hf.tokenizer_checks import check_ids
from sft_jax.models.architecture import Architecture
from sft_jax.run.announce import Announcer
from sft_jax.run.resume import last_step, with_date
from sft_jax.sharding import check_heads
from sft_jax.store.folder import RunDirectory
from sft_jax.store.loggers.choose import check_loggers
from sft_jax.training.optimizer import check_rates
from sft_jax.training.programs import keep_programs


@dataclass(frozen=True)
class Inputs:
    """The devices, model folder, tokenizer and data of a run.

    Attributes:
        config: the config with the absolute path of the model and the date used by ``strftime_now``.
        latest: the step that the run resumes from; None for a new run.
        num_added: number of ``data.added_tokens`` that the tokenizer did not have.
        plan: the plan of batches; None for a stream.
    """

    config: Config
    mesh: Mesh
    folder: RunDirectory
    latest: int | None
    base: Base
    tokenizer: Any
    num_added: int
    data: Prepared
    held_out: Prepared | None
    task: Task | None
    plan: Plan | None
    total_steps: int

    @property
    def arch(self) -> Architecture:
        """The architecture of the trained network, with a vocabulary that includes added tokens."""
        size = max(self.base.arch.vocab_size, len(self.tokenizer))
        return dataclasses.replace(self.base.arch, vocab_size=size)

    @property
    def trains_embeddings(self) -> bool:
        """Whether the embeddings and ``lm_head`` are trained together with adapters."""
        lora = self.config.lora
        return self.num_added > 0 or (lora is not None and lora.train_embeddings)

    @property
    def longest(self) -> int:
        """The longest sequence length of any batch."""
        return self.config.data.max_length if self.plan is None else int(self.plan.lengths.max(initial=1))

    @property
    def stop_ids(self) -> list[int]:
        """The stop tokens of the data, then those of the base model."""
        return list(dict.fromkeys([*self.data.examples.stop_ids, *self.base.stop_ids]))


def _check_added_tokens(config: Config, base: Base, tokenizer: Any) -> None:
    """Check that no added token has the id of an image: transformers would look for the image."""
    media = media_tokens(read_config(base.folder))
    for token in config.data.added_tokens:
        if (key := media.get(tokenizer.convert_tokens_to_ids(token))) is not None:
            raise UserError(
                f"data.added_tokens: {token!r} is the token of {key} in config.json, in whose place transformers puts "
                "an image, video or audio; use another token"
            )


def prepare(config: Config, devices: Sequence[Any] | None, say: Announcer) -> Inputs:
    """Read and check everything except the weights; writes nothing.

    Raises:
        UserError: anything wrong with config, model, data or run directory.
    """
    # -- devices and run directory ------------------------------------------------------------------------------------
    prepare_to_open([*config.data.train, *config.data.eval])
    mesh = check_mesh(config, devices)
    if config.lora is not None:
        method(config.lora.method)
    if jax.process_index() == 0:
        check_loggers(config.training)
    folder = RunDirectory(config.training.output_dir)
    folder.check()
    if jax.process_index() == 0:
        folder.check_free()
    latest = last_step(folder)
    say.mesh(mesh)
    keep_programs(mesh.devices.flat[0])

    # -- model folder and tokenizer -----------------------------------------------------------------------------------
    base = open_base(config.model.path, config.model.revision, init=config.model.init)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=absolute(config.model.path)))
    tokenizer, num_added = load_tokenizer(
        base.folder, config.data.chat_template, config.data.added_tokens, config.data.template_kwargs
    )
    check_ids(tokenizer, base.arch.vocab_size)
    _check_added_tokens(config, base, tokenizer)
    config = with_date(config, tokenizer, folder.local, latest)

    # -- data ---------------------------------------------------------------------------------------------------------
    settings, positions = config.data, base.arch.max_positions
    is_stream = settings.streaming
    sources = first_rows(settings.train) if is_stream else settings.train
    data = prepare_data(settings, sources, tokenizer, base.stop_ids, positions)
    held_out = None
    if settings.eval:
        held_out = prepare_data(settings, settings.eval, tokenizer, base.stop_ids, positions, is_held_out=True)
    data = leave_out(data, held_out, settings.leave_out)
    say.data("stream" if is_stream else "data", data)
    if held_out is not None:
        say.data("held out", held_out)
    task = None
    if config.evaluation.at_end:
        task = prepare_task(config, base.arch, tokenizer, base.stop_ids, data)
        say.task(task, names=("documents",))

    # -- plan ---------------------------------------------------------------------------------------------------------
    plan = None if is_stream else plan_of(settings, config.training, data.examples)
    total_steps = config.training.max_steps if plan is None else plan.num_steps
    assert total_steps is not None
    say.plan(config, data.examples, plan)
    check_rates(config.optimizer, total_steps)
    inputs = Inputs(config, mesh, folder, latest, base, tokenizer, num_added, data, held_out, task, plan, total_steps)
    if len(tokenizer) > base.arch.vocab_size and not num_added and config.lora is not None:
        say.new_embeddings(len(tokenizer), base.arch.vocab_size)
    check_heads(inputs.arch.attention_specs, mesh)
    return inputs
