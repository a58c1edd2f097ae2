"""A model put together: devices, architecture, network, weights, tokenizer and stop tokens. The only place for it.

Training, planning and evaluation start from a config; everything else from what a user calls a model: a built-in name,
a Hugging Face folder or id, a run directory, an adapter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from sft_jax.config import Config, LoraConfig
from sft_jax.data.batches.packing import row_lengths
from sft_jax.errors import UserError
from sft_jax.hf.config import read_config, stop_ids
from sft_jax.hf.hub import find_model, weights_of
from sft_jax.hf.load import load_params
from sft_jax.hf.peft import base_fingerprint, load_adapter, num_embeddings, read_adapter_config
from sft_jax.hf.reader import TensorReader, is_other_weights
from sft_jax.hf.ties import architecture_of
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.inference.generator import Generator
from sft_jax.models.architecture import Architecture
from sft_jax.models.attention.backend import choose_backend
from sft_jax.models.decoder import Decoder
from sft_jax.models.split import Split
from sft_jax.sharding import check_batch, check_heads, check_lengths, make_mesh
from sft_jax.store.folder import RunFolder
from sft_jax.store.opened import OpenedRun, open_run
from sft_jax.training.compilation import keep_programs
from sft_jax.training.cross_entropy import Terms
from sft_jax.training.losses import cross_entropy_loss
from sft_jax.training.optimizer import make_schedule
from sft_jax.training.step import TrainStep, make_train_step
from sft_jax.training.weights import build
from sft_jax.tree import Params, flatten, unflatten
from sft_jax.tree import Path as LeafPath
from sft_jax.typing import Array


@dataclass(frozen=True)
class Base:
    """The folder of a base model, before its weights are read.

    Attributes:
        reader: of its weights; None where they are random.
        arch: as the files have it.
        stop_ids: of its generation config.
    """

    folder: Path
    reader: TensorReader | None
    arch: Architecture
    stop_ids: list[int]

    @property
    def dtype_of_embeddings(self) -> np.dtype | None:
        """In its files."""
        return None if self.reader is None else self.reader.dtype("model.embed_tokens.weight")


@dataclass(frozen=True)
class Model:
    """A network with its weights on the devices, its tokenizer and its stop tokens.

    Attributes:
        description: what was opened, for people.
        split: the network.
        params: trainable leaves; adapters are float32.
        frozen: all other leaves, in the compute dtype or quantised.
    """

    description: str
    split: Split
    params: Params
    frozen: Params
    tokenizer: Any
    stop_ids: list[int]

    @property
    def arch(self) -> Architecture:
        return self.split.arch

    @property
    def mesh(self) -> Mesh:
        return self.split.mesh

    @cached_property
    def generator(self) -> Generator:
        """Generates with these stop tokens."""
        return Generator(self.split, self.stop_ids)

    def network(self) -> Decoder:
        """The Flax module."""
        return self.split.merge(self.params, self.frozen)

    def with_params(self, params: Params) -> Model:
        """The same network with other trainable leaves."""
        return dataclasses.replace(self, params=params)


# -- from a config ----------------------------------------------------------------------------------------------------


def check_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config, which divides its batches.

    Args:
        devices: which to use; by default all there are.

    Raises:
        UserError: sizes that do not multiply to the devices, or that do not divide batch or sequences.
    """
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    parts = config.training.num_microbatches
    check_batch(config.training.batch_size, 1 if parts == "auto" else parts, mesh)
    check_lengths(row_lengths(config.data), mesh)
    return mesh


def open_base(name: str, revision: str | None = None, asked_by: str = "model.path", init: str = "pretrained") -> Base:
    """Find a base model, and read all but its weights.

    Args:
        asked_by: the key or option that names it, for messages.
        init: ``random`` where its weights are not used.

    Raises:
        UserError: it is not there, or not supported.
    """
    folder = find_model(name, revision, asked_by)
    reader = TensorReader(weights_of(folder)) if init == "pretrained" else None
    return Base(folder, reader, architecture_of(folder, reader), stop_ids(folder))


def network_of(config: Config, arch: Architecture, mesh: Mesh, embeddings: bool, remat: str = "full") -> Split:
    """The network that a config describes, taken apart; nothing is allocated.

    Args:
        embeddings: train embeddings and ``lm_head`` beside adapters.
        remat: a rematerialization policy.

    Raises:
        UserError: an attention backend that cannot compute this, a LoRA target that matches nothing, a layer that
            cannot be quantised.
    """
    model = config.model
    length = math.gcd(*row_lengths(config.data))
    backend = choose_backend(model.attention, mesh, arch.attention_specs, model.dtype, length)
    return build(
        arch,
        mesh,
        config.lora,
        model.dtype,
        remat,
        embeddings,
        backend=backend,
        quantization=model.quantization,
        param_dtype=model.param_dtype,
    )


def step_of(
    config: Config,
    network: Split,
    optimizer: optax.GradientTransformationExtraArgs,
    total_steps: int,
    shardings: Any,
    num_sources: int,
    num_microbatches: int,
) -> TrainStep:
    """The jitted train step that a config describes; see :func:`sft_jax.training.step.make_train_step`.

    Args:
        total_steps: of the schedule.
        shardings: of the state.
        num_sources: whose losses are told apart; 0 for not at all.
    """
    training = config.training
    key = jax.random.key(training.seed)
    dropout = config.lora is not None and config.lora.dropout > 0
    return make_train_step(
        network,
        optimizer,
        make_schedule(config.optimizer, total_steps),
        num_microbatches,
        jax.random.fold_in(key, 1) if dropout else None,
        shardings,
        cross_entropy_loss(num_sources, Terms(training.label_smoothing, training.z_loss)),
        jax.random.fold_in(key, 3),
    )


# -- from a name ------------------------------------------------------------------------------------------------------


def open_model(
    name: str,
    base: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
    devices: Sequence[Any] | None = None,
) -> Model:
    """Open a model by what a user calls it, over all devices.

    Args:
        name: ``builtin:tiny``, a Hugging Face folder or id, a run directory, or a PEFT adapter folder.
        base: the base model of a run or an adapter, where it is not where that says.
        step: a checkpoint of a run; by default the last.
        dtype: of computing; by default the run's, or that of the files.
        devices: which to use; by default all there are.

    Raises:
        UserError: nothing of that name, or a base that is missing or does not fit.
    """
    folder = Path(name).expanduser()
    mesh = make_mesh(devices=devices)
    keep_programs(mesh.devices.flat[0])
    if (run := RunFolder(name)).is_run():
        return _open_run(run, base, step, dtype, mesh)
    if step is not None:
        raise UserError(f"{name}: only run directories have steps, and this is none")
    if (folder / "adapter_config.json").is_file():
        return _open_adapter(folder, base, dtype, mesh)
    if base is not None:
        raise UserError(f"{name}: only runs and adapters have a base model, and this is neither")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{name}: neither a run, nor a Hugging Face model, nor a PEFT adapter is in this folder")
    found = open_base(name, asked_by="model")
    tokenizer, _ = load_tokenizer(found.folder)
    dtype = dtype or _file_dtype(found.folder)
    split = build(found.arch, mesh, None, dtype, remat="none", full=False)
    frozen = _frozen(split, found, {})
    description = f"{name}, {found.arch.family}, {dtype}"
    return Model(description, split, {}, frozen, tokenizer, _with_eos(found.stop_ids, tokenizer))


def open_tuned(run: OpenedRun) -> tuple[Base, Architecture]:
    """The base model of a run, and the architecture with its added tokens."""
    arch = architecture_of(run.base, run.reader)
    base = Base(run.base, run.reader, arch, stop_ids(run.base))
    return base, dataclasses.replace(arch, vocab_size=run.vocab_size)


def _open_run(folder: RunFolder, name: str | None, step: int | None, dtype: str | None, mesh: Mesh) -> Model:
    run = open_run(folder, step, name)
    base, arch = open_tuned(run)
    check_heads(arch.attention_specs, mesh)
    config = run.config
    dtype, quantization = dtype or config.model.dtype, config.model.quantization
    embeddings = quantization is not None and run.trains_embeddings  # trained, so they are not quantised
    split = build(arch, mesh, config.lora, dtype, "none", embeddings, full=False, quantization=quantization)
    leaves = flatten(split.trainable) | flatten(split.frozen)
    given = run.restore({path: leaves[path] for path in run.trained})
    frozen = _frozen(split, base, given)
    stops = list(dict.fromkeys([*run.stop_ids, *_with_eos(base.stop_ids, run.tokenizer)]))
    what = f"{folder} at step {run.step}, {'full fine-tuning' if config.lora is None else 'LoRA'} of "
    of = f"{config.model.path}, {dtype}" + (f", base in {quantization}" if quantization else "")
    return Model(f"{what}{of}", split, _params(split, given), frozen, run.tokenizer, stops)


def _open_adapter(folder: Path, name: str | None, dtype: str | None, mesh: Mesh) -> Model:
    config = read_adapter_config(folder)
    asked_by = "--base" if name else f"{folder / 'adapter_config.json'}: base_model_name_or_path"
    base = open_base(name or config.base, None if name else config.revision, asked_by)
    assert base.reader is not None
    trained_on = base_fingerprint(folder)
    if trained_on is not None and is_other_weights(trained_on, base.reader.fingerprint()):
        raise UserError(
            f"{asked_by}: {base.folder} has other weights of the same shapes than those that {folder} was trained on; "
            "name the right base with --base"
        )
    arch = dataclasses.replace(base.arch, vocab_size=max(base.arch.vocab_size, num_embeddings(folder) or 0))
    check_heads(arch.attention_specs, mesh)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer, _ = load_tokenizer(folder if has_tokenizer else base.folder)
    dtype = dtype or _file_dtype(base.folder)
    lora = LoraConfig(method=config.method, rank=config.rank, alpha=config.alpha, target_modules=config.target_modules)
    split = build(arch, mesh, lora, dtype, remat="none", full=False)
    given = load_adapter(str(folder), split, embeddings=True)
    frozen = _frozen(split, base, given)
    stops = _with_eos(stop_ids(folder) or base.stop_ids, tokenizer)
    description = f"{folder}, adapter of rank {config.rank} on {name or config.base}, {dtype}"
    return Model(description, split, _params(split, given), frozen, tokenizer, stops)


def _params(split: Split, given: dict[LeafPath, Array]) -> Params:
    return unflatten({path: given[path] for path in flatten(split.trainable)})


def _frozen(split: Split, base: Base, given: dict[LeafPath, Array]) -> Params:
    """Frozen leaves on the devices: those given as they are, the others from the files."""
    leaves, of_base = flatten(split.frozen), split.base()
    loaded = {path: given[path] for path in leaves if path in given}
    wanted = of_base.keys() - loaded.keys() - flatten(split.trainable).keys()
    if base.reader is not None:
        tied, old_size = split.arch.tie_word_embeddings, base.arch.vocab_size
        loaded |= load_params(base.reader, of_base, split.stored, wanted, tied, old_size)
    return unflatten({path: loaded[path] for path in leaves})


def _file_dtype(folder: Path) -> str:
    """The dtype of a model's files, as far as it is one we compute in: float16 has too small a range."""
    config = read_config(folder)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return "float32" if dtype == "float32" else "bfloat16"


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    return ids or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
