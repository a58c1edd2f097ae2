"""The very step of a config, as shapes and shardings on devices that need not be there, and what compiling it tells."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sft_jax.assembly import check_mesh, network_of, step_of
from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.hf.reader import TensorReader
from sft_jax.hf.ties import architecture_of
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.models.architecture import Architecture
from sft_jax.models.split import Split
from sft_jax.planning.collectives import Collective, count_collectives
from sft_jax.planning.flops import Sizes, Work
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
from sft_jax.training.compilation import SHARE, Way, temp_bytes, ways_of
from sft_jax.training.cross_entropy import chunk_size
from sft_jax.training.optimizer import labels_of, make_optimizer
from sft_jax.training.state import TrainState, abstract_state, state_shardings
from sft_jax.training.step import TrainStep
from sft_jax.typing import Batch

_STEPS = 1000  # of a schedule whose length depends on data that are not read; a number in the program, no more


@dataclass(frozen=True)
class Base:
    """What is known about a base model without its weights."""

    arch: Architecture  # with added tokens
    embeddings: bool  # whether they and lm_head are trained beside adapters, as where tokens are added


@dataclass(frozen=True)
class AbstractStep:
    """What a step is compiled from."""

    config: Config
    base: Base
    mesh: Mesh
    split: Split
    network: Sizes
    state: TrainState
    batch: Batch
    ways: tuple[Way, ...]  # rematerialization policies and numbers of microbatches, as train would try them

    @property
    def arch(self) -> Architecture:
        return self.base.arch

    def in_parts(self, num_microbatches: int) -> AbstractStep:
        """The same with another number of microbatches."""
        training = dataclasses.replace(self.config.training, num_microbatches=num_microbatches)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, training=training))

    @property
    def shards(self) -> int:
        """Over how many devices rows are split."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def rows(self) -> int:
        """Rows that a device, or those along ``sequence`` and ``tensor`` together, compute at a time."""
        training = self.config.training
        return training.batch_size // training.num_microbatches // self.shards

    @property
    def slots(self) -> int:
        """Slots of these rows that are a device's own."""
        return self.rows * self.config.data.max_length // self.mesh.shape["sequence"]

    def sizes(self) -> dict[str, int]:
        """Bytes of a device by what they are, before and besides the step's temporaries."""
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

    def kept_bytes(self, remat: str) -> int:
        """The least of a device that a policy keeps of all layers for the backward pass of the rows at a time.

        See :mod:`sft_jax.models.remat`; adapters' products, a few columns, are left out.
        """
        tensor = self.mesh.shape["tensor"]
        of_token = float(self.arch.num_layers * self.arch.hidden_size)  # the inputs of layers
        for one in self.network.products:
            if remat != "full" and one.axes[0] == "heads":  # what attention gives
                of_token += one.count * one.inputs / tensor
            if remat in ("dots", "none") and not one.is_last:
                of_token += one.count * one.share * one.outputs / (1 if one.axes[1] == "embed" else tensor)
        return int(self.slots * of_token * jnp.dtype(self.config.model.dtype).itemsize)

    def resident_bytes(self) -> int:
        """Bytes of a device that are there before the step: weights, optimizer state and batch."""
        sizes = self.sizes()
        return sum(sizes[name] for name in ("frozen", "trained", "optimizer", "batch"))

    def work(self, target_share: float, document_length: int) -> Work:
        """Of a step, all slots of which are filled."""
        tokens = self.config.training.batch_size * self.config.data.max_length
        return Work(tokens, tokens * target_share, float(tokens) * document_length)

    def loss_chunks(self, target_share: float) -> int:
        """How often the loop over chunks of targets turns in a part of the batch."""
        vocab = axis_names("head_vocab", self.mesh)
        tokens = axis_names("batch", self.mesh) + axis_names("length", self.mesh)
        gathered = math.prod(self.mesh.shape[name] for name in tokens if name in vocab)
        columns = -(-self.arch.vocab_size // num_parts("head_vocab", self.mesh))
        trained = self.config.lora is None or self.base.embeddings
        chunk = chunk_size(self.slots, columns * gathered, 4 * self.arch.hidden_size * columns if trained else 0)
        return -(-round(self.slots * target_share) // chunk)

    def step(self, remat: str) -> TrainStep:
        """The jitted step with a rematerialisation policy."""
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
    """What the compiler says of a step; bytes are those of a device."""

    remat: str
    num_microbatches: int
    fits: bool
    peak_bytes: int | None  # None: too large, and the compiler did not say by how much
    argument_bytes: int | None
    temp_bytes: int | None  # beyond the arguments
    spare_bytes: int | None  # of what the arguments leave, that a step is not to take
    room_bytes: int | None  # that is left besides; negative where it does not fit
    seconds: float  # tracing and compiling
    cpu_seconds: float  # the same, of all cores together
    collectives: list[Collective] | None  # None: not counted


def read_base(config: Config, folder: Path) -> Base:
    """The architecture in a folder with a ``config.json``; no weights are read but a head beside a tied config.

    Without a tokenizer beside it, each of ``data.added_tokens`` counts as new.
    """
    has_weights = any((folder / f"model.safetensors{ending}").is_file() for ending in ("", ".index.json"))
    arch = architecture_of(folder, TensorReader(folder) if has_weights else None)
    asked = config.lora is not None and config.lora.train_embeddings
    if not config.data.added_tokens:
        return Base(arch, embeddings=asked)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    size, added = arch.vocab_size + len(config.data.added_tokens), len(config.data.added_tokens)
    if has_tokenizer:
        tokenizer, added = load_tokenizer(folder, None, config.data.added_tokens)
        size = max(arch.vocab_size, len(tokenizer))
    return Base(dataclasses.replace(arch, vocab_size=size), embeddings=asked or added > 0)


def abstract_step(config: Config, base: Base, devices: Sequence[Any]) -> AbstractStep:
    """The step of a config as ``train`` would build it on these devices; nothing is allocated.

    Raises:
        UserError: a mesh, batch, attention backend or LoRA target that ``train`` would refuse.
    """
    mesh = check_mesh(config, devices)
    check_heads(base.arch.attention_specs, mesh)
    split = network_of(config, base.arch, mesh, base.embeddings)
    ways = ways_of(config, mesh)
    state = abstract_state(split.trainable, _optimizer(config, split), mesh)
    shape = (config.training.batch_size, config.data.max_length)
    sharding = named_sharding(mesh, ("batch", "length"), shape)

    def column(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    ids = column(jnp.int32)
    sources = ids if len({source.path for source in config.data.train}) > 1 else None
    batch = Batch(ids, ids, column(jnp.float32), ids, ids, sources)
    return AbstractStep(config, base, mesh, split, Sizes.of(split), state, batch, tuple(ways)).in_parts(ways[0][1])


def compile_step(step: AbstractStep, usable_bytes: int, target_share: float = 1.0) -> Compiled:
    """Compile as the config says; what is ``auto`` there, as ``train`` does, in the first way that fits.

    A way that would keep more than there is room for is passed over without being compiled.

    Args:
        usable_bytes: of a device.
        target_share: of positions that carry loss, for the turns of the loop over them.
    """
    if len(step.ways) == 1:
        # A TPU's compiler knows all that a program needs; a GPU's does not know the workspaces of libraries.
        share = 1.0 if step.mesh.devices.flat[0].platform == "tpu" else SHARE
        return _compile(step, step.ways[0], usable_bytes, target_share, share)
    room = usable_bytes - step.resident_bytes()
    *larger, smallest = step.ways
    seconds = cpu_seconds = 0.0
    for remat, parts in larger:
        if step.in_parts(parts).kept_bytes(remat) > room:
            continue
        found = _compile(step, (remat, parts), usable_bytes, target_share, SHARE)
        seconds, cpu_seconds = seconds + found.seconds, cpu_seconds + found.cpu_seconds
        if found.fits:
            return dataclasses.replace(found, seconds=seconds, cpu_seconds=cpu_seconds)
    found = _compile(step, smallest, usable_bytes, target_share, SHARE)
    seconds, cpu_seconds = seconds + found.seconds, cpu_seconds + found.cpu_seconds
    return dataclasses.replace(found, seconds=seconds, cpu_seconds=cpu_seconds)


def _compile(step: AbstractStep, way: Way, usable_bytes: int, target_share: float, share: float) -> Compiled:
    """In one way; it fits if the step takes no more than a share of what its arguments leave free."""
    remat, parts = way
    step = step.in_parts(parts)
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
                raise UserError(f"attention by cuDNN is compiled with cuDNN, but no GPU: {GPU_COMPILER}") from error
            if "RESOURCE_EXHAUSTED" not in str(error):  # the compiler's word for a program that does not fit
                raise
            return Compiled(remat, parts, False, _size_in(str(error)), None, None, None, None, *spent(), None)
    seconds = spent()
    memory = program.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    # The peak knows what is alive when; not every compiler tells it.
    peak = memory.peak_memory_in_bytes or arguments + temporary
    needed = temp_bytes(program) if share < 1 else peak - arguments  # what train compares
    spare = int((1 - share) * (usable_bytes - arguments))
    room = usable_bytes - arguments - spare - needed
    collectives = None
    if text is not None:
        collectives = count_collectives(text, hosts_of(step.mesh), step.loss_chunks(target_share))
    return Compiled(remat, parts, room >= 0, peak, arguments, temporary, spare, room, *seconds, collectives)


def _size_in(message: str) -> int | None:
    """The size of a program that is too large, from the compiler's message, of which there are two.

    >>> _size_in("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.") / 2**30
    20.5
    >>> _size_in("RESOURCE_EXHAUSTED: the total memory required (1.50T) exceeds available HBM (15.75G).") / 2**40
    1.5
    """
    match = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds available", message)
    if match is None:
        return None
    number, unit = (found for found in match.groups() if found is not None)
    return int(float(number) * 2 ** (10 * (1 + "KMGT".index(unit))))


def _optimizer(config: Config, split: Split) -> Any:
    return make_optimizer(config.optimizer, labels_of(split.trainable, split.labels), config.training.seed)
