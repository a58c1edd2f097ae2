"""Exports a run as a Hugging Face folder: a PEFT adapter, or a full model with the adapter merged.

Writes tensors one at a time, from the files of the base model and the trained weights of the run. Copies untrained base
weights bit for bit. Each process writes its own files, and holds one tensor and its shard of one trained weight at a
time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sft_jax import builtin
from sft_jax.adapters.lora import LoRA
from sft_jax.assembly import open_tuned
from sft_jax.errors import UserError
from sft_jax.files.buckets import is_url
from sft_jax.files.json_object import read_object
from sft_jax.files.new_folder import new_folder, num_bytes
from sft_jax.hf.config import (
    read_architecture,
    read_config,
    read_format,
    stop_ids,
    with_dtype,
    with_tie,
    with_vocab_size,
)
from sft_jax.hf.hub import absolute, commit_of
from sft_jax.hf.peft import save_adapter, targets
from sft_jax.hf.save import Tensor, TensorWriter
from sft_jax.hf.tokenizer_files import write_tokenizer
from sft_jax.hf.verify import read_verified, verified_chunks
from sft_jax.models.architecture import Architecture
from sft_jax.models.split import Split, is_adapter
from sft_jax.models.tensors import Stored
from sft_jax.progress import Work
from sft_jax.run.export_card import card_of, rename_card
from sft_jax.sharding import make_mesh
from sft_jax.store.exported import holds, record, write_record
from sft_jax.store.opened import OpenedRun, open_run
from sft_jax.store.steps import Step
from sft_jax.training.rounding import convert, converted_dtype, round_for_file
from sft_jax.training.weights import build
from sft_jax.tree import Path as LeafPath

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Written:
    """An export: ``form`` is ``adapter`` or ``merged``, ``step`` that of the checkpoint."""

    form: str
    step: int


def export(
    run: str | Path,
    out: str | Path,
    form: str | None = None,
    step: Step = None,
    base: str | None = None,
    dtype: str | None = None,
    published_as: str | None = None,
) -> Written:
    """Export a run to ``out``, a new or empty folder. A failed export leaves no model there.

    Args:
        run: a run directory; it and ``out`` may be in a bucket.
        form: ``adapter`` or ``merged``; by default ``adapter`` for LoRA and ``merged`` for full fine-tuning.
        step: a checkpoint, ``best`` or ``last``; by default the last.
        base: the base model, if it has moved.
        dtype: of a merged model; by default that of each tensor in the base model's files.
        published_as: ``USER/REPO`` that it is uploaded to. An export of the same run, step, form and dtype that ``out``
            already holds is then used as it is.

    Raises:
        UserError: no such run or step, a folder that is not empty, or ``adapter`` for a fully fine-tuned run.
    """
    opened = open_run(run, step, base)
    is_main = jax.process_index() == 0
    form = form or ("merged" if opened.config.lora is None else "adapter")
    if form == "adapter" and opened.config.lora is None:
        raise UserError(f"{run}: was fully fine-tuned, so there is no adapter; use --format merged")
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if form == "adapter" and dtype is not None:
        raise UserError("--dtype: is for --format merged; adapters are written in float32, as they are trained")
    split = _network(opened)
    values = record(opened, form, dtype)
    if published_as is not None and holds(Path(out), values):
        rename_card(Path(out), lambda name: card_of(opened, form, split.arch, name), published_as)
        print(f"{out}: already holds the {form} of step {opened.step}, and is not written again")
        _say_limits(opened, form, is_published=True)
        return Written(form, opened.step)
    with new_folder(str(out)) as folder:
        if form == "adapter":
            _write_adapter(opened, split, folder)
        else:
            _write_merged(opened, split, folder, None if dtype is None else np.dtype(dtype))
        if is_main:
            _write_generation_config(opened, folder)
            write_tokenizer(opened.tokenizer, opened.base, folder)
            card = card_of(opened, form, split.arch, published_as or Path(out).absolute().name)
            (folder / "README.md").write_text(card, encoding="utf-8")
            write_record(folder, values)
    if is_main:
        print(f"{out}: {form} of step {opened.step}, {num_bytes(str(out)) / 1e6:.1f} MB")
        if form == "merged" and opened.reader is not None and (fmt := read_format(opened.base)) is not None:
            print(f"the base is stored in {fmt.name}; the export is {dtype or 'bfloat16'}")
        _say_limits(opened, form, published_as is not None)
    return Written(form, opened.step)


def _say_limits(run: OpenedRun, form: str, is_published: bool) -> None:
    """Print what cannot read an adapter."""
    if form == "adapter" and run.trains_embeddings:
        print(
            "the adapter holds the full embeddings and lm_head, which PEFT reads but vLLM and llama.cpp do not; "
            "use --format merged for these"
        )
    path = run.config.model.path
    if form == "adapter" and is_url(path):
        print(
            f"its base model is {path}, which PEFT cannot open; set the path of a copy in adapter_config.json, or "
            "use --format merged"
        )
    elif form == "adapter" and is_published and (path.startswith(builtin.PREFIX) or Path(path).exists()):
        print(
            f"its base model is {path}, which others do not have; use --format merged, or set base_model_name_or_path "
            "in adapter_config.json to a Hugging Face id, and run the same command again"
        )


def write_adapter(run: OpenedRun, folder: Path) -> None:
    """Write only the two files of the PEFT adapter of a run to an existing folder."""
    _write_adapter(run, _network(run), folder)


def _network(run: OpenedRun) -> Split:
    """The abstract network of a run, which maps parameters to the names of tensors in files."""
    _, arch = open_tuned(run)
    mesh = make_mesh(devices=jax.devices()[:1])
    return build(arch, mesh, run.config.lora, "float32", embeddings=run.trains_embeddings)


def _write_adapter(run: OpenedRun, split: Split, folder: Path) -> None:
    """Write the adapter, and the embeddings if they were trained."""
    leaves = restore_replicated(run, run.trained)
    if jax.process_index() != 0:
        return
    assert isinstance(split.variant, LoRA)
    tensors = {}
    for path, leaf in leaves.items():
        stored = split.stored[path]
        for number, name in enumerate(stored.names):
            if is_adapter(split.labels[path]):
                tensors[name] = stored.as_in_file(leaf, number, leaf.dtype)
            else:
                tensor = _in_file(stored, leaf[stored.index(number)], number, run.dtype(name))
                tensors[split.arch.in_modules(name)] = np.ascontiguousarray(tensor)
    path = run.config.model.path
    save_adapter(
        folder,
        tensors,
        split.variant,
        *targets(split),
        str(run.base) if path.startswith(builtin.PREFIX) else absolute(path),
        commit_of(run.base) or run.config.model.revision,
        run.fingerprint,
        split.arch.conv1d,
        within=split.arch.module_prefix if split.arch.is_part else None,
    )


def _write_merged(run: OpenedRun, split: Split, folder: Path, dtype: np.dtype | None) -> None:
    """Write a full model.

    Each process writes the untrained and merged tensors of its own files. All processes restore the trained weights
    together, one at a time.

    Args:
        dtype: of all tensors of floating point; None for that of each in the base model's files.
    """
    in_file = partial(converted_dtype, dtype)
    arch = split.arch
    trained = {path: leaf for path, leaf in run.trained.items() if not is_adapter(split.labels[path])}
    tensors = {
        name: Tensor(split.stored[path].shape(leaf.shape), in_file(run.dtype(name)))
        for path, leaf in trained.items()
        for name in split.stored[path].names
    }
    reader = run.reader
    untrained = set() if reader is None else reader.names - set(tensors)
    if arch.tie_word_embeddings and arch.embeddings_tensor in tensors:
        untrained -= {arch.lm_head_tensor}  # some tied models store a copy of the embeddings, which is now outdated
    if reader is not None:
        tensors |= {name: Tensor(reader.shape(name), in_file(reader.dtype(name))) for name in untrained}
    updates = _updates(run, split)
    tensors = dict(sorted(tensors.items()))
    with (
        TensorWriter(folder, tensors, process=jax.process_index(), num_processes=jax.process_count()) as writer,
        Work("writing", writer.num_bytes, "B", "tensors") as bar,
    ):

        def write(name: str, rows: np.ndarray, start: int = 0) -> None:
            writer.write(name, rows, start)
            bar.update(rows.nbytes)

        for name in filter(writer.owns, sorted(untrained)):
            assert reader is not None
            if name in updates:
                weight = read_verified(reader, name, run.tensors)
                write(name, _merged(split.variant, weight, updates[name], name, in_file(weight.dtype)))
            else:
                for start, rows in verified_chunks(reader, name, run.tensors):
                    write(name, convert(rows, in_file(rows.dtype), name), start)
        for path, leaf in trained.items():
            stored = split.stored[path]
            for i, element in enumerate(restore_elements(run, path, leaf, stored.stack)):
                for number in range(i * stored.parts, (i + 1) * stored.parts):
                    if writer.owns(name := stored.names[number]):
                        write(name, _in_file(stored, jax.device_get(element), number, in_file(run.dtype(name))))
    if jax.process_index() == 0:
        config = _config(run, arch, tensors[arch.embeddings_tensor].shape[0])
        if dtype is not None:
            config = with_dtype(config, dtype.name)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(run: OpenedRun, arch: Architecture, num_embeddings: int) -> dict[str, Any]:
    """Return ``config.json`` of the base, changed where the files that are written differ from it.

    Args:
        num_embeddings: in the files, since a tokenizer may have more tokens than the base has embeddings.
    """
    config, before = read_config(run.base), read_architecture(run.base)
    if num_embeddings != before.vocab_size:
        config = with_vocab_size(config, num_embeddings)
    config.pop("quantization_config", None)  # the tensors that are written are not quantized
    if names := config.get("architectures"):  # a base model saved without lm_head is named ...Model
        whole = "ForConditionalGeneration" if arch.is_part else "ForCausalLM"
        config["architectures"] = [re.sub("Model$", whole, name) for name in names]
    if before.tie_word_embeddings != arch.tie_word_embeddings:
        config = with_tie(config, arch.tie_word_embeddings)  # as in the files
    elif arch.is_part and arch.tie_word_embeddings and config.get("tie_word_embeddings") is False:
        config = with_tie(config, True)  # only text_config said so, and transformers reads the other
    return config


@dataclass
class _Update:
    """The adapter of a tensor: its parameters by name, and whether the tensor is stored as ``[…, out, in]``."""

    transposed: bool
    parameters: dict[str, np.ndarray] = field(default_factory=dict)


def _in_file(stored: Stored, element: np.ndarray, number: int, dtype: np.dtype) -> np.ndarray:
    """Return a tensor of a trained base weight as in the files, from an element of its stack."""
    tensor = round_for_file(stored.columns(element, number), dtype, stored.names[number])
    return tensor.swapaxes(-1, -2) if stored.transposed else tensor


def _merged(variant: Any, weight: np.ndarray, update: _Update, name: str, dtype: np.dtype) -> np.ndarray:
    """Merge an adapter into a tensor, computed in float32 and rounded once."""
    if not variant.changes(update.parameters):
        return convert(weight, dtype, name)
    matrix = weight.swapaxes(-1, -2) if update.transposed else weight
    merged = round_for_file(variant.merge(matrix.astype(np.float32), update.parameters), dtype, name)
    return merged.swapaxes(-1, -2) if update.transposed else merged


def _write_generation_config(run: OpenedRun, folder: Path) -> None:
    """Write the generation config of the base model, with the trained stop tokens first in ``eos_token_id``."""
    path = run.base / "generation_config.json"
    config = read_object(path) if path.is_file() else {}
    ids = list(dict.fromkeys([*run.stop_ids, *stop_ids(run.base)]))
    config["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    (folder / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def restore_replicated(run: OpenedRun, leaves: Mapping[LeafPath, jax.ShapeDtypeStruct]) -> dict[LeafPath, np.ndarray]:
    """Restore small trained weights, replicated on all processes."""
    replicated = NamedSharding(_all_devices(), PartitionSpec())
    abstract = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated) for path, x in leaves.items()}
    return jax.device_get(run.restore(abstract))


def restore_elements(
    run: OpenedRun, path: LeafPath, leaf: jax.ShapeDtypeStruct, stack: tuple[int, ...]
) -> Iterator[jax.Array]:
    """Restore a stacked weight, sharded over all processes, and yield its elements, each replicated.

    Args:
        stack: the leading dimensions; empty for a weight that is not stacked.
    """
    mesh = _all_devices()
    first = len(stack)
    sizes = leaf.shape[first:]
    longest = first + max(range(len(sizes)), key=lambda dim: (sizes[dim] % mesh.size == 0, sizes[dim]))
    divides = leaf.shape[longest] % mesh.size == 0
    spec = PartitionSpec(*("all" if dim == longest and divides else None for dim in range(len(leaf.shape))))
    abstract = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
    array = run.restore({path: abstract})[path]
    one = jax.jit(lambda x, index: x[index], out_shardings=NamedSharding(mesh, PartitionSpec()))
    for index in np.ndindex(*stack):
        yield one(array, tuple(map(np.int32, index)))


def _all_devices() -> Mesh:
    return jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))


def _updates(run: OpenedRun, split: Split) -> dict[str, _Update]:
    """The adapters by the name of the base tensor that they change."""
    updates: dict[str, _Update] = {}
    adapter = {path: leaf for path, leaf in run.trained.items() if is_adapter(split.labels[path])}
    for path, leaf in restore_replicated(run, adapter).items():
        stored = split.stored[(*path[:-1], "weight")]
        for number, name in enumerate(stored.names):
            element = leaf[stored.index(number)]
            parameters = updates.setdefault(name, _Update(stored.transposed)).parameters
            parameters[path[-1]] = element if path[-1] == "lora_a" else stored.columns(element, number)
    return updates
