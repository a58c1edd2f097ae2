"""Assembles models from devices, architecture, network, weights, tokenizer and stop tokens.

Training, planning and evaluation start from a config. Other commands start from a model name: a built-in name, a
Hugging Face folder or id, a run directory, or an adapter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sft_jax.config import Config, LoraConfig
from sft_jax.data.batches.packing import sequence_lengths
from sft_jax.errors import UserError
from sft_jax.files.digests import Words, texts
from sft_jax.hf.config import compute_dtype, stop_ids
from sft_jax.hf.dequantized import open_weights
from sft_jax.hf.hub import find_model, is_gguf
from sft_jax.hf.load import load_params
from sft_jax.hf.peft import base_fingerprint, load_adapter, num_embeddings, read_adapter_config
from sft_jax.hf.reader import Reader, is_other_weights
from sft_jax.hf.ties import architecture_of
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.hf.tokenizer_checks import check_ids
from sft_jax.hf.verify import check_tensors
from sft_jax.inference.generator import Generator
from sft_jax.models.architecture import Architecture
from sft_jax.models.attention.backend import choose_backend
from sft_jax.models.decoder import Decoder
from sft_jax.models.eight_bit import check_device
from sft_jax.models.split import Split
from sft_jax.sharding import check_batch, check_heads, check_lengths, make_mesh
from sft_jax.store.folder import RunDirectory
from sft_jax.store.opened import OpenedRun, open_run
from sft_jax.store.steps import Step
from sft_jax.training.programs import keep_programs
from sft_jax.training.weights import build
from sft_jax.tree import Params, flatten, unflatten
from sft_jax.tree import Path as LeafPath
from sft_jax.typing import Array


@dataclass(frozen=True)
class Base:
    """A base model whose weights are not read yet.

    Attributes:
        reader: reads its weights; None if they are initialized at random.
        arch: the architecture of its files.
        stop_ids: the stop token ids of its generation config.
    """

    folder: Path
    reader: Reader | None
    arch: Architecture
    stop_ids: list[int]

    @property
    def dtype_of_embeddings(self) -> np.dtype | None:
        """The dtype of the embeddings in its files; None if they are not there, which loading refuses."""
        name = self.arch.embeddings_tensor
        return None if self.reader is None or name not in self.reader.names else self.reader.dtype(name)


@dataclass(frozen=True)
class Model:
    """A network with its weights on the devices, its tokenizer and its stop tokens.

    Attributes:
        description: what was opened, to be printed.
        split: the network.
        params: trainable parameters; adapters are float32.
        frozen: all other parameters, in the compute dtype or quantized.
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
        """Generates until one of the stop tokens."""
        return Generator(self.split, self.stop_ids)

    def network(self) -> Decoder:
        """The Flax module."""
        return self.split.merge(self.params, self.frozen)

    def with_params(self, params: Params) -> Model:
        """The same network with other trainable parameters."""
        return dataclasses.replace(self, params=params)


@dataclass(frozen=True)
class Found:
    """A model whose weights are not read yet.

    Attributes:
        base: the model itself, or the base model of a run or an adapter.
        trained: reads the trained weights of a run or an adapter.
        adapter: the PEFT folder of an adapter.
    """

    description: str
    base: Base
    split: Split
    tokenizer: Any
    stop_ids: list[int]
    trained: Callable[[], dict[LeafPath, Array]]
    run: OpenedRun | None = None
    adapter: Path | None = None

    def load(self) -> Model:
        """Read the weights."""
        trained = self.trained()
        frozen = _frozen(self.split, self.base, trained, self.run.tensors if self.run is not None else {})
        params = unflatten({path: trained[path] for path in flatten(self.split.trainable)})
        return Model(self.description, self.split, params, frozen, self.tokenizer, self.stop_ids)


# -- from a config ----------------------------------------------------------------------------------------------------


def check_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Make the mesh of a config, and check that it divides the batches.

    Args:
        devices: the devices to use; by default all.

    Raises:
        UserError: axis sizes that do not multiply to the number of devices, or that do not divide the batch or the
            sequence length.
    """
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    num_microbatches = config.training.num_microbatches
    check_batch(config.training.batch_size, 1 if num_microbatches == "auto" else num_microbatches, mesh)
    check_lengths(sequence_lengths(config.data), mesh)
    return mesh


def open_base(name: str, revision: str | None = None, asked_by: str = "model.path", init: str = "pretrained") -> Base:
    """Find a base model and read everything except its weights.

    Args:
        asked_by: the config key or option that names the model, for error messages.
        init: ``random`` if its weights are not used.

    Raises:
        UserError: the model is not found or not supported.
    """
    folder = find_model(name, revision, asked_by)
    reader = open_weights(folder) if init == "pretrained" else None
    arch = architecture_of(folder, reader)
    if reader is None and arch.is_part:
        raise UserError(
            f"model.init: random makes only the decoder of {arch.family}, and its export would lack the other parts; "
            "use a config.json of the decoder, which is text_config"
        )
    return Base(folder, reader, arch, stop_ids(folder))


def network_of(config: Config, arch: Architecture, mesh: Mesh, embeddings: bool, remat: str = "full") -> Split:
    """Build the abstract network of a config; allocates no arrays.

    Args:
        embeddings: train the embeddings and ``lm_head`` together with adapters.
        remat: the rematerialization policy.

    Raises:
        UserError: an unsupported attention backend, a LoRA target module that matches nothing, a layer that cannot be
            quantized, eight-bit products that the device does not have, or a loss of routers without routers.
    """
    model = config.model
    if config.training.router_aux_loss and not arch.has_routers:
        raise UserError(f"training.router_aux_loss: {model.path} has no experts; leave it at 0")
    length = math.gcd(*sequence_lengths(config.data))
    deterministic = config.training.deterministic
    if model.compute is not None:
        check_device(model.compute, mesh.devices.flat[0])
    backend = choose_backend(model.attention, mesh, arch.attention_specs, model.dtype, length, deterministic)
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
        compute=model.compute,
    )


# -- from a name ------------------------------------------------------------------------------------------------------


def open_model(
    name: str,
    base: str | None = None,
    step: Step = None,
    dtype: str | None = None,
    devices: Sequence[Any] | None = None,
) -> Model:
    """Open a model by name on all devices; the arguments and errors are those of :func:`find`."""
    return find(name, base, step, dtype, devices).load()


def find(
    name: str,
    base: str | None = None,
    step: Step = None,
    dtype: str | None = None,
    devices: Sequence[Any] | None = None,
    quantized: bool = True,
) -> Found:
    """Find a model by name and read everything except its weights.

    Args:
        name: ``builtin:tiny``, a Hugging Face folder or id, a run directory, or a PEFT adapter folder.
        base: the base model of a run or an adapter, if it has moved.
        step: a checkpoint of a run, ``best`` or ``last``; by default the last.
        dtype: compute dtype; by default that of the run or of the files.
        devices: the devices to use; by default all.
        quantized: whether the base model of a QLoRA run is quantized as in training.

    Raises:
        UserError: no model of that name, or a base model that is missing or does not match.
    """
    folder = Path(name).expanduser()
    mesh = make_mesh(devices=devices)
    keep_programs(mesh.devices.flat[0])
    if (run := RunDirectory(name)).is_run():
        return _find_run(run, base, step, dtype, mesh, quantized)
    if step is not None:
        raise UserError(f"{name}: only run directories have steps, and this is not one; leave out the step")
    if (folder / "adapter_config.json").is_file():
        return _find_adapter(folder, base, dtype, mesh)
    if base is not None:
        raise UserError(f"{name}: only runs and adapters have a base model, and this is neither; leave out --base")
    if folder.is_dir() and not (folder / "config.json").is_file():
        gguf = next((f"; {one.name} is GGUF, which is not read" for one in folder.iterdir() if is_gguf(one)), "")
        raise UserError(f"{name}: this folder holds neither a run, nor a Hugging Face model, nor a PEFT adapter{gguf}")
    model = open_base(name, asked_by="model")
    tokenizer, _ = load_tokenizer(model.folder)
    check_ids(tokenizer, model.arch.vocab_size)
    dtype = dtype or compute_dtype(model.folder)
    split = build(model.arch, mesh, None, dtype, remat="none", full=False)
    description = f"{name}, {model.arch.family}, {dtype}"
    return Found(description, model, split, tokenizer, _with_eos(model.stop_ids, tokenizer), dict)


def open_tuned(run: OpenedRun) -> tuple[Base, Architecture]:
    """The base model of a run, and its architecture including added tokens."""
    arch = architecture_of(run.base, run.reader)
    base = Base(run.base, run.reader, arch, stop_ids(run.base))
    return base, dataclasses.replace(arch, vocab_size=run.vocab_size)


def _find_run(
    directory: RunDirectory, name: str | None, step: Step, dtype: str | None, mesh: Mesh, quantized: bool
) -> Found:
    run = open_run(directory, step, name)
    base, arch = open_tuned(run)
    check_heads(arch.attention_specs, mesh)
    config = run.config
    dtype, quantization = dtype or config.model.dtype, config.model.quantization if quantized else None
    embeddings = quantization is not None and run.trains_embeddings  # trained embeddings are not quantized
    compute = config.model.compute if quantized and config.lora is not None else None
    split = build(
        arch, mesh, config.lora, dtype, "none", embeddings, full=False, quantization=quantization, compute=compute
    )
    leaves = flatten(split.trainable) | flatten(split.frozen)
    stops = list(dict.fromkeys([*run.stop_ids, *_with_eos(base.stop_ids, run.tokenizer)]))
    method = "full fine-tuning" if config.lora is None else type(split.variant).__name__
    description = f"{directory} at step {run.step}, {method} of {config.model.path}, {dtype}"
    description += f", base in {quantization or compute}" if quantization or compute else ""
    trained = partial(run.restore, {path: leaves[path] for path in run.trained})
    return Found(description, base, split, run.tokenizer, stops, trained, run=run)


def _find_adapter(folder: Path, name: str | None, dtype: str | None, mesh: Mesh) -> Found:
    config = read_adapter_config(folder)
    asked_by = "--base" if name else f"{folder / 'adapter_config.json'}: base_model_name_or_path"
    base = open_base(name or config.base, None if name else config.revision, asked_by)
    assert base.reader is not None
    trained_on = base_fingerprint(folder)
    if trained_on is not None and is_other_weights(trained_on, base.reader.fingerprint()):
        raise UserError(
            f"{asked_by}: {folder} was trained on a model with other weights than {base.folder}; set the right base "
            "model with --base"
        )
    arch = dataclasses.replace(base.arch, vocab_size=max(base.arch.vocab_size, num_embeddings(folder, base.arch) or 0))
    check_heads(arch.attention_specs, mesh)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer, _ = load_tokenizer(folder if has_tokenizer else base.folder)
    check_ids(tokenizer, arch.vocab_size)
    dtype = dtype or compute_dtype(base.folder)
    lora = LoraConfig(method=config.method, rank=config.rank, alpha=config.alpha, target_modules=config.target_modules)
    split = build(arch, mesh, lora, dtype, remat="none", full=False)
    stops = _with_eos(stop_ids(folder) or base.stop_ids, tokenizer)
    description = f"{folder}, adapter of rank {config.rank} on {name or config.base}, {dtype}"
    trained = partial(load_adapter, str(folder), split, embeddings=True)
    return Found(description, base, split, tokenizer, stops, trained, adapter=folder)


def _frozen(split: Split, base: Base, trained: dict[LeafPath, Array], expected: Mapping[str, str]) -> Params:
    """Frozen parameters on the devices: from ``trained`` where present, otherwise from the files.

    Args:
        expected: the digests of the tensors that a run began with.
    """
    leaves, base_leaves = flatten(split.frozen), split.base()
    loaded = {path: trained[path] for path in leaves if path in trained}
    missing = base_leaves.keys() - loaded.keys() - flatten(split.trainable).keys()
    if base.reader is not None:
        words: dict[str, Words] | None = {} if expected else None
        loaded |= load_params(base.reader, base_leaves, split.stored, missing, split.arch, base.arch.vocab_size, words)
        check_tensors(base.reader, expected, texts(words or {}))
    return unflatten({path: loaded[path] for path in leaves})


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    return ids or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
