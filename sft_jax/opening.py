"""A network ready to be used, from whatever a user has: built-in name, model folder, hub id, run folder or adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sft_jax.config import LoraConfig
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
from sft_jax.models.split import Split
from sft_jax.run_folder import RunFolder
from sft_jax.runs import open_run
from sft_jax.sharding import check_heads, make_mesh
from sft_jax.training.compilation import keep_programs
from sft_jax.training.weights import build
from sft_jax.tree import Params, flatten, unflatten
from sft_jax.tree import Path as LeafPath
from sft_jax.typing import Array


@dataclass(frozen=True)
class Opened:
    """A network with its weights in place: adapters in float32, all else in the compute dtype or quantised."""

    description: str  # what was opened, for people
    arch: Architecture
    tokenizer: Any
    mesh: Mesh
    split: Split
    adapter: Params
    frozen: Params
    stop_ids: list[int]

    def generator(self) -> Generator:
        """A generator that stops at this network's stop tokens."""
        return Generator(self.split, self.arch.max_positions, self.stop_ids, self.mesh)


def open_model(
    name: str,
    base: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
    devices: Sequence[Any] | None = None,
) -> Opened:
    """Open a model by what a user calls it, over all devices.

    Args:
        name: ``builtin:tiny``, a Hugging Face folder or id, a run folder, or a PEFT adapter folder.
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
        raise UserError(f"{name}: only run folders have steps, and this is none")
    if (folder / "adapter_config.json").is_file():
        return _open_adapter(folder, base, dtype, mesh)
    if base is not None:
        raise UserError(f"{name}: only runs and adapters have a base model, and this is neither")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{name}: neither a run, nor a Hugging Face model, nor a PEFT adapter is in this folder")
    found = find_model(name, asked_by="model")
    tokenizer, _ = load_tokenizer(found)
    reader = TensorReader(weights_of(found))
    arch = architecture_of(found, reader)
    dtype = dtype or _file_dtype(found)
    split = build(arch, mesh, None, dtype, remat="none", full=False)
    frozen = _place(split, reader, {}, arch.vocab_size)
    stops = _with_eos(stop_ids(found), tokenizer)
    return Opened(f"{name}, {arch.family}, {dtype}", arch, tokenizer, mesh, split, {}, frozen, stops)


def _open_run(folder: RunFolder, base: str | None, step: int | None, dtype: str | None, mesh: Mesh) -> Opened:
    run = open_run(folder, step, base)
    arch = architecture_of(run.base, run.reader)
    old_vocab_size = arch.vocab_size
    arch = dataclasses.replace(arch, vocab_size=run.vocab_size)
    check_heads(arch.attention_specs, mesh)
    dtype = dtype or run.config.model.dtype
    quantization = run.config.model.quantization
    embeddings = quantization is not None and run.trains_embeddings  # trained, so they are not quantised
    split = build(arch, mesh, run.config.lora, dtype, "none", embeddings, full=False, quantization=quantization)
    leaves = flatten(split.trainable) | flatten(split.frozen)
    given = run.restore({path: leaves[path] for path in run.trained})
    frozen = _place(split, run.reader, given, old_vocab_size)
    adapter = {path: given[path] for path in flatten(split.trainable)}
    stops = list(dict.fromkeys([*run.stop_ids, *_with_eos(stop_ids(run.base), run.tokenizer)]))
    what = f"{folder} at step {run.step}, {'full fine-tuning' if run.config.lora is None else 'LoRA'} of "
    of = f"{run.config.model.path}, {dtype}" + (f", base in {quantization}" if quantization else "")
    return Opened(f"{what}{of}", arch, run.tokenizer, mesh, split, unflatten(adapter), frozen, stops)


def _open_adapter(folder: Path, base: str | None, dtype: str | None, mesh: Mesh) -> Opened:
    config = read_adapter_config(folder)
    asked_by = "--base" if base else f"{folder / 'adapter_config.json'}: base_model_name_or_path"
    found = find_model(base or config.base, None if base else config.revision, asked_by)
    reader = TensorReader(weights_of(found))
    trained_on = base_fingerprint(folder)
    if trained_on is not None and is_other_weights(trained_on, reader.fingerprint()):
        raise UserError(
            f"{asked_by}: {found} has other weights of the same shapes than those that {folder} was trained on; name "
            "the right base with --base"
        )
    arch = architecture_of(found, reader)
    old_vocab_size = arch.vocab_size
    arch = dataclasses.replace(arch, vocab_size=max(arch.vocab_size, num_embeddings(folder) or 0))
    check_heads(arch.attention_specs, mesh)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer, _ = load_tokenizer(folder if has_tokenizer else found)
    dtype = dtype or _file_dtype(found)
    lora = LoraConfig(method=config.method, rank=config.rank, alpha=config.alpha, target_modules=config.target_modules)
    split = build(arch, mesh, lora, dtype, remat="none", full=False)
    given = load_adapter(str(folder), split, embeddings=True)
    frozen = _place(split, reader, given, old_vocab_size)
    adapter = unflatten({path: given[path] for path in flatten(split.trainable)})
    stops = _with_eos(stop_ids(folder) or stop_ids(found), tokenizer)
    return Opened(
        f"{folder}, adapter of rank {config.rank} on {base or config.base}, {dtype}",
        arch,
        tokenizer,
        mesh,
        split,
        adapter,
        frozen,
        stops,
    )


def _place(split: Split, reader: TensorReader | None, given: dict[LeafPath, Array], old_vocab_size: int) -> Params:
    """Frozen leaves in place: those given as they are, the others from the files."""
    leaves, base = flatten(split.frozen), split.base()
    loaded = {path: given[path] for path in leaves if path in given}
    wanted = base.keys() - loaded.keys() - flatten(split.trainable).keys()
    if reader is not None:
        loaded |= load_params(reader, base, split.stored, wanted, split.arch.tie_word_embeddings, old_vocab_size)
    return unflatten({path: loaded[path] for path in leaves})


def _file_dtype(folder: Path) -> str:
    """The dtype of a model's files, as far as it is one we compute in: float16 has too small a range."""
    config = read_config(folder)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return "float32" if dtype == "float32" else "bfloat16"


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    return ids or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
