"""Builds the training step of a config from shapes and shardings and compiles it ahead of time for any topology."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sft_jax.assembly import check_mesh, network_of
from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.hf.dequantized import open_weights
from sft_jax.hf.ties import architecture_of
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.models.architecture import Architecture
from sft_jax.models.moe.describe import EXPERT_LOOPS, describe_experts, expected_parts
from sft_jax.models.split import Split
from sft_jax.models.work import Work
from sft_jax.planning.collectives import Collective, count_collectives
from sft_jax.planning.flops import Sizes
from sft_jax.planning.hlo import Program, parse
from sft_jax.planning.network import hosts_of
from sft_jax.planning.program_text import compile_with_text
from sft_jax.planning.topology import GPU_COMPILER
from sft_jax.sharding import (
    axis_names,
    bytes_per_device,
    check_heads,
    named_sharding,
    num_parts,
)
from sft_jax.training.compilation import SHARE, FitOption, fit_options, temp_bytes
from sft_jax.training.cross_entropy import chunk_size
from sft_jax.training.optimizer import labels_of, make_optimizer
from sft_jax.training.state import TrainState, abstract_state, state_shardings
from sft_jax.training.step import TrainStep, step_of
from sft_jax.typing import Batch

_STEPS = 1000  # schedule length where it depends on the data; only a constant in the program


@dataclass(frozen=True)
class Base:
    """A base model without its weights."""

    arch: Architecture  # the vocabulary includes added tokens
    embeddings: bool  # whether LoRA also trains embeddings and lm_head, as it does where tokens are added


@dataclass(frozen=True)
class AbstractStep:
    """Everything that a step is compiled from, as shapes and shardings."""

    config: Config
    base: Base
    mesh: Mesh
    split: Split
    network: Sizes
    state: TrainState
    batch: Batch
    ways: tuple[FitOption, ...]  # pairs of remat policy and number of microbatches, in the order that train tries them

    @property
    def arch(self) -> Architecture:
        return self.base.arch

    def with_microbatches(self, num_microbatches: int) -> AbstractStep:
        """Returns the step with another number of microbatches."""
        training = dataclasses.replace(self.config.training, num_microbatches=num_microbatches)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, training=training))

    @property
    def shards(self) -> int:
        """Number of shards of the batch axis."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def local_batch_size(self) -> int:
        """Sequences of a microbatch on one batch shard (the devices along ``sequence`` and ``tensor``)."""
        training = self.config.training
        return training.batch_size // training.num_microbatches // self.shards

    @property
    def local_tokens(self) -> int:
        """Tokens of a microbatch on one device."""
        return self.local_batch_size * self.config.data.max_length // self.mesh.shape["sequence"]

    @property
    def experts(self) -> str | None:
        """How the experts are sharded; None without experts."""
        training, arch = self.config.training, self.split.arch
        tokens = (training.batch_size // training.num_microbatches, self.config.data.max_length, arch.hidden_size)
        itemsize = jnp.dtype(self.config.model.dtype).itemsize
        return describe_experts(self.split.abstract(), self.mesh, tokens, itemsize)

    def sizes(self) -> dict[str, int]:
        """Bytes per device of the step's inputs by kind, and of the gradients."""
        trained = bytes_per_device(self.state.params)
        accumulates = self.config.training.num_microbatches > 1
        gradients = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, jnp.float32 if accumulates else leaf.dtype, sharding=leaf.sharding
            ),
            self.state.params,
        )
        return {
            "frozen": bytes_per_device(self.split.frozen),
            "trained": trained,
            "optimizer": bytes_per_device(self.state.opt_state),
            "batch": bytes_per_device(self.batch),
            "gradients": bytes_per_device(gradients),
        }

    def saved_bytes(self, remat: str) -> int:
        """Lower bound of the activation bytes per device that a policy saves for the backward pass of a microbatch.

        See :mod:`sft_jax.models.remat`. The small outputs of ``lora_a`` are ignored.
        """
        tensor = self.mesh.shape["tensor"]
        per_token = float(self.arch.num_layers * self.arch.hidden_size)  # inputs of the layers
        for one in self.network.products:
            if remat != "full" and one.axes[0] == "heads":  # outputs of attention
                per_token += one.count * one.inputs / tensor
            if remat in ("dots", "none") and not one.is_last:
                per_token += one.count * one.share * one.outputs / (1 if one.axes[1] == "embed" else tensor)
        return int(self.local_tokens * per_token * jnp.dtype(self.config.model.dtype).itemsize)

    def resident_bytes(self) -> int:
        """Bytes per device in use before the step runs: weights, optimizer state and batch."""
        sizes = self.sizes()
        return sum(sizes[name] for name in ("frozen", "trained", "optimizer", "batch"))

    def work(self, target_share: float, document_length: int) -> Work:
        """The work of a step without padding."""
        tokens = self.config.training.batch_size * self.config.data.max_length
        return Work(tokens, tokens * target_share, float(tokens) * document_length)

    def loss_chunks(self, target_share: float) -> int:
        """Iterations of the loss's loop over chunks of target tokens in one microbatch."""
        vocab = axis_names("head_vocab", self.mesh)
        tokens = axis_names("batch", self.mesh) + axis_names("length", self.mesh)
        gathered = math.prod(self.mesh.shape[name] for name in tokens if name in vocab)
        columns = -(-self.arch.vocab_size // num_parts("head_vocab", self.mesh))
        trained = self.config.lora is None or self.base.embeddings
        chunk = chunk_size(self.local_tokens, columns * gathered, 4 * self.arch.hidden_size * columns if trained else 0)
        return -(-round(self.local_tokens * target_share) // chunk)

    def loop_trips(self, target_share: float) -> Callable[[str], float]:
        """Returns a function from the source lines of a loop whose trip count depends on data to its iterations."""
        experts = expected_parts(self.split.abstract(), self.local_tokens, self.mesh.shape["tensor"])
        chunks = self.loss_chunks(target_share)
        return lambda source: experts if f"{EXPERT_LOOPS}:" in source else chunks

    def step(self, remat: str) -> TrainStep:
        """Returns the jitted step with a rematerialization policy."""
        network = network_of(self.config, self.arch, self.mesh, self.base.embeddings, remat)
        sources = len({source.path for source in self.config.data.train})
        optimizer = _optimizer(self.config, self.split)
        shardings = state_shardings(self.split.trainable, optimizer, self.mesh)
        return step_of(
            self.config,
            network,
            optimizer,
            self.config.training.max_steps or _STEPS,
            shardings,
            sources if sources > 1 else 0,
            self.config.training.num_microbatches,
        )


@dataclass(frozen=True)
class Compiled:
    """What the compiler reports about a step; bytes are per device."""

    remat: str
    num_microbatches: int
    fits: bool
    peak_bytes: int | None  # None: out of memory, and the compiler did not report the size
    argument_bytes: int | None
    temp_bytes: int | None  # besides the arguments
    spare_bytes: int | None  # headroom that a step must leave free
    room_bytes: int | None  # free besides the headroom; negative where the step does not fit
    seconds: float  # tracing and compiling
    cpu_seconds: float  # the same in CPU time of all cores
    collectives: list[Collective] | None  # None: not counted
    program: Program | None  # the program's text; None if it does not fit, or where the compiler writes none


def read_base(config: Config, folder: Path) -> Base:
    """Reads the architecture from a folder with a ``config.json``.

    Weights, where there are any, are opened only to detect an untied ``lm_head``. Without a tokenizer in the folder,
    each of ``data.added_tokens`` counts as new.
    """
    has_weights = any((folder / f"model.safetensors{ending}").is_file() for ending in ("", ".index.json"))
    arch = architecture_of(folder, open_weights(folder) if has_weights else None)
    trains_embeddings = config.lora is not None and config.lora.train_embeddings
    if not config.data.added_tokens:
        return Base(arch, embeddings=trains_embeddings)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    size, added = arch.vocab_size + len(config.data.added_tokens), len(config.data.added_tokens)
    if has_tokenizer:
        tokenizer, added = load_tokenizer(folder, None, config.data.added_tokens)
        size = max(arch.vocab_size, len(tokenizer))
    return Base(dataclasses.replace(arch, vocab_size=size), embeddings=trains_embeddings or added > 0)


def abstract_step(config: Config, base: Base, devices: Sequence[Any]) -> AbstractStep:
    """Builds the step as ``train`` would on these devices, without allocating any array.

    Raises:
        UserError: a mesh, batch, attention backend or LoRA target that ``train`` would refuse.
    """
    mesh = check_mesh(config, devices)
    check_heads(base.arch.attention_specs, mesh)
    split = network_of(config, base.arch, mesh, base.embeddings)
    ways = fit_options(config, mesh)
    state = abstract_state(split.trainable, _optimizer(config, split), mesh)
    shape = (config.training.batch_size, config.data.max_length)
    sharding = named_sharding(mesh, ("batch", "length"), shape)

    def column(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    ids = column(jnp.int32)
    sources = ids if len({source.path for source in config.data.train}) > 1 else None
    batch = Batch(ids, ids, column(jnp.float32), ids, ids, sources)
    step = AbstractStep(config, base, mesh, split, Sizes.of(split), state, batch, tuple(ways))
    return step.with_microbatches(ways[0][1])


def compile_step(step: AbstractStep, usable_bytes: int, target_share: float = 1.0) -> Compiled:
    """Compiles the step; resolves ``auto`` settings like ``train``, to the first of ``step.ways`` that fits.

    Skips a way whose saved activations alone exceed the free memory.

    Args:
        usable_bytes: memory of a device that the process can use.
        target_share: fraction of tokens that carry loss; sets the trip count of the loss's loop over target tokens.
    """
    if len(step.ways) == 1:
        # The TPU compiler accounts for all memory of a program; the GPU compiler omits library workspaces.
        share = 1.0 if step.mesh.devices.flat[0].platform == "tpu" else SHARE
        return _compile(step, step.ways[0], usable_bytes, target_share, share)
    room = usable_bytes - step.resident_bytes()
    *larger, smallest = step.ways
    seconds = cpu_seconds = 0.0
    for remat, num_microbatches in larger:
        if step.with_microbatches(num_microbatches).saved_bytes(remat) > room:
            continue
        compiled = _compile(step, (remat, num_microbatches), usable_bytes, target_share, SHARE)
        seconds, cpu_seconds = seconds + compiled.seconds, cpu_seconds + compiled.cpu_seconds
        if compiled.fits:
            return dataclasses.replace(compiled, seconds=seconds, cpu_seconds=cpu_seconds)
    compiled = _compile(step, smallest, usable_bytes, target_share, SHARE)
    seconds, cpu_seconds = seconds + compiled.seconds, cpu_seconds + compiled.cpu_seconds
    return dataclasses.replace(compiled, seconds=seconds, cpu_seconds=cpu_seconds)


def _compile(step: AbstractStep, way: FitOption, usable_bytes: int, target_share: float, share: float) -> Compiled:
    """Compiles one way; it fits if its temporaries use at most ``share`` of the memory besides the arguments."""
    remat, num_microbatches = way
    step = step.with_microbatches(num_microbatches)
    began, cpu_began = time.perf_counter(), time.process_time()

    def spent() -> tuple[float, float]:
        return time.perf_counter() - began, time.process_time() - cpu_began

    function: Any = step.step(remat)
    with jax.set_mesh(step.mesh):
        try:
            lowered = function.lower(step.state, step.split.frozen, step.batch)
            program, text = compile_with_text(lowered, step.mesh.devices.flat[0].platform)
        except RuntimeError as error:
            if "cuDNN not found" in str(error):
                raise UserError(
                    f"compiling attention for cuDNN needs the cuDNN library (no GPU): {GPU_COMPILER}"
                ) from error
            if "RESOURCE_EXHAUSTED" not in str(error):  # raised for a program that does not fit
                raise
            peak = _size_in(str(error))
            return Compiled(remat, num_microbatches, False, peak, None, None, None, None, *spent(), None, None)
    seconds = spent()
    memory = program.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    # The peak accounts for buffer lifetimes, but not every compiler reports it.
    peak = memory.peak_memory_in_bytes or arguments + temporary
    needed = temp_bytes(program) if share < 1 else peak - arguments  # train compares temp_bytes
    spare = int((1 - share) * (usable_bytes - arguments))
    room = usable_bytes - arguments - spare - needed
    written = None if text is None else parse(text)
    collectives = None
    if written is not None:
        collectives = count_collectives(written, hosts_of(step.mesh), step.loss_chunks(target_share))
    return Compiled(
        remat, num_microbatches, room >= 0, peak, arguments, temporary, spare, room, *seconds, collectives, written
    )


def _size_in(message: str) -> int | None:
    """Parses the size of a program from the two forms of the compiler's out-of-memory message.

    >>> _size_in("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.") / 2**30
    20.5
    >>> _size_in("RESOURCE_EXHAUSTED: the total memory required (1.50T) exceeds available HBM (15.75G).") / 2**40
    1.5
    """
    match = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds available", message)
    if match is None:
        return None
    number, unit = (group for group in match.groups() if group is not None)
    return int(float(number) * 2 ** (10 * (1 + "KMGT".index(unit))))


def _optimizer(config: Config, split: Split) -> Any:
    return make_optimizer(config.optimizer, labels_of(split.trainable, split.labels), config.training.seed)
