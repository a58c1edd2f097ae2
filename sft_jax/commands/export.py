"""A run as a Hugging Face folder: a PEFT adapter, or a whole model with the adapter merged in.

Tensors are made one at a time from the base model's files and the run's trained leaves: base weights that were not
trained are copied bit by bit, and no network is built. Several processes write one folder, each its own files; each
holds its part of one trained leaf at a time, and one tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from sft_jax import builtin
from sft_jax.buckets import is_url
from sft_jax.errors import UserError
from sft_jax.hf.card import model_card
from sft_jax.hf.config import read_architecture, read_config, stop_ids
from sft_jax.hf.hub import absolute, commit_of
from sft_jax.hf.names import is_stacked, is_transposed, module_name, tensor_names
from sft_jax.hf.peft import save_adapter
from sft_jax.hf.reader import chunks
from sft_jax.hf.save import Tensor, TensorWriter
from sft_jax.hf.ties import architecture_of
from sft_jax.hf.tokenizer_files import write_tokenizer
from sft_jax.metrics import read_metrics
from sft_jax.model_folder import new_folder, num_bytes
from sft_jax.models.lora import is_adapter
from sft_jax.runs import Run, open_run
from sft_jax.tree import Path as LeafPath


def export(
    run: str | Path, out: str | Path, form: str | None = None, step: int | None = None, base: str | None = None
) -> None:
    """Write a run's result to ``out``, which must not exist yet or be empty; it appears whole or not at all.

    Args:
        run: a run folder; it and ``out`` may be in a bucket.
        form: ``adapter`` or ``merged``; by default what was trained.
        step: a checkpoint; by default the last.
        base: the base model, where it is not where it was.

    Raises:
        UserError: no such run or step, a folder that is not empty, or an adapter asked of full fine-tuning.
    """
    opened = open_run(run, step, base)
    is_main = jax.process_index() == 0
    form = form or ("merged" if opened.config.lora is None else "adapter")
    if form == "adapter" and opened.config.lora is None:
        raise UserError(f"{run}: was fully fine-tuned, so there is no adapter; use --format merged")
    with new_folder(str(out)) as folder:
        if form == "adapter":
            _write_adapter(opened, folder)
        else:
            _write_merged(opened, folder)
        if is_main:
            _write_generation_config(opened, folder)
            write_tokenizer(opened.tokenizer, opened.base, folder)
            losses = read_metrics(opened.folder.local / "metrics.jsonl")
            card = model_card(opened.config, form, opened.step, losses, opened.dtype("model.embed_tokens.weight"))
            (folder / "README.md").write_text(card, encoding="utf-8")
    if is_main:
        print(f"{out}: {form} of step {opened.step}, {num_bytes(str(out)) / 1e6:.1f} MB")
        if form == "adapter" and not all(map(is_adapter, opened.trained)):
            print(
                "it carries the token table and the head whole, which PEFT reads and vLLM and llama.cpp do not: give "
                "these --format merged"
            )
        of = opened.config.model.path
        if form == "adapter" and is_url(of):
            print(f"its base is {of}, which PEFT does not open: name a copy in adapter_config.json, or --format merged")


def _write_adapter(run: Run, folder: Path) -> None:
    lora = run.config.lora
    assert lora is not None
    adapter = {path: leaf for path, leaf in run.trained.items() if is_adapter(path)}
    tables = {path: leaf for path, leaf in run.trained.items() if not is_adapter(path)}
    leaves = whole(run, adapter | tables)
    if jax.process_index() != 0:
        return
    save_adapter(
        folder,
        {path: leaves[path] for path in adapter},
        {name: _as_in_file(run, name, path, leaves[path]) for path in tables for name in tensor_names(path, 0)},
        read_architecture(run.base).num_layers,
        lora.rank,
        lora.alpha,
        lora.dropout,
        str(run.base) if run.config.model.path.startswith(builtin.PREFIX) else absolute(run.config.model.path),
        commit_of(run.base) or run.config.model.revision,
        run.fingerprint,
    )


def _write_merged(run: Run, folder: Path) -> None:
    """Untrained and merged tensors by the process whose file they are in; trained ones a leaf at a time, by all."""
    arch = architecture_of(run.base, run.reader)
    trained = {path: leaf for path, leaf in run.trained.items() if not is_adapter(path)}
    names = {path: tensor_names(path, arch.num_layers) for path in trained}
    tensors = {
        name: Tensor(_file_shape(path, leaf.shape), run.dtype(name))
        for path, leaf in trained.items()
        for name in names[path]
    }
    reader = run.reader
    untrained = set() if reader is None else reader.names - set(tensors)
    if arch.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        untrained -= {"lm_head.weight"}  # some tied models carry a copy of the table, which is now out of date
    if reader is not None:
        tensors |= {name: Tensor(reader.shape(name), reader.dtype(name)) for name in untrained}
    updates = _updates(run, arch.num_layers)
    tensors = dict(sorted(tensors.items()))
    with (
        TensorWriter(folder, tensors, process=jax.process_index(), num_processes=jax.process_count()) as writer,
        tqdm(total=writer.num_bytes, unit="B", unit_scale=True, desc="writing", leave=False, disable=None) as bar,
    ):

        def write(name: str, rows: np.ndarray, start: int = 0) -> None:
            writer.write(name, rows, start)
            bar.update(rows.nbytes)

        for name in filter(writer.owns, sorted(untrained)):
            assert reader is not None
            if name in updates:
                write(name, _merged(run, reader.read(name), *updates[name]))
            else:
                for start, rows in chunks(reader, name):
                    write(name, rows, start)
        for path, leaf in trained.items():
            for name, layer in zip(names[path], layers(run, path, leaf), strict=True):
                if writer.owns(name):
                    write(name, _as_in_file(run, name, path, jax.device_get(layer)))
    if jax.process_index() == 0:
        # What the file has: a tokenizer may have tokens that the base's table never had rows for.
        config: dict[str, Any] = read_config(run.base) | {"vocab_size": tensors["model.embed_tokens.weight"].shape[0]}
        if names := config.get("architectures"):  # saved without its head, a model is not named as one that has one
            config["architectures"] = [re.sub("Model$", "ForCausalLM", name) for name in names]
        if read_architecture(run.base).tie_word_embeddings and not arch.tie_word_embeddings:
            config["tie_word_embeddings"] = False  # as the files have it
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _merged(run: Run, weight: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``weight [out, in]`` with the update of an adapter, computed in float32 and rounded once."""
    if not b.any():  # adding zero would turn -0.0 into 0.0
        return weight
    lora = run.config.lora
    assert lora is not None
    return (weight.astype(np.float32) + np.float32(lora.alpha / lora.rank) * (a @ b).T).astype(weight.dtype)


def _write_generation_config(run: Run, folder: Path) -> None:
    """The base's generation config, with the trained stop tokens first among the eos ids."""
    path = run.base / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ids = list(dict.fromkeys([*run.stop_ids, *stop_ids(run.base)]))
    config["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    (folder / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def whole(run: Run, leaves: Mapping[LeafPath, jax.ShapeDtypeStruct]) -> dict[LeafPath, np.ndarray]:
    """Small trained leaves, whole on each process."""
    everywhere = NamedSharding(_all_devices(), PartitionSpec())
    abstract = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for path, x in leaves.items()}
    return jax.device_get(run.restore(abstract))


def layers(run: Run, path: LeafPath, leaf: jax.ShapeDtypeStruct) -> Iterator[jax.Array]:
    """A trained leaf, layer by layer, each whole on each process; the leaf itself is split over all of them."""
    mesh = _all_devices()
    first = int(is_stacked(path))
    sizes = leaf.shape[first:]
    longest = first + max(range(len(sizes)), key=lambda dim: (sizes[dim] % mesh.size == 0, sizes[dim]))
    divides = leaf.shape[longest] % mesh.size == 0
    spec = PartitionSpec(*("all" if dim == longest and divides else None for dim in range(len(leaf.shape))))
    abstract = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
    array = run.restore({path: abstract})[path]
    everywhere = NamedSharding(mesh, PartitionSpec())
    if not first:
        yield jax.jit(lambda x: x, out_shardings=everywhere)(array)
        return
    one = jax.jit(lambda x, i: lax.dynamic_index_in_dim(x, i, keepdims=False), out_shardings=everywhere)
    for i in range(leaf.shape[0]):
        yield one(array, np.int32(i))


def _all_devices() -> Mesh:
    return jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))


def _file_shape(path: LeafPath, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of one of the tensors that a leaf stands for."""
    shape = shape[1:] if is_stacked(path) else shape
    return shape[::-1] if is_transposed(path) else shape


def _as_in_file(run: Run, name: str, path: LeafPath, layer: np.ndarray) -> np.ndarray:
    # Contiguous, because the safetensors library writes an array's memory as it lies.
    return np.ascontiguousarray((layer.T if is_transposed(path) else layer).astype(run.dtype(name)))


def _updates(run: Run, num_layers: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Base tensors that an adapter changes: file name to its ``A [in, R]`` and ``B [R, out]``."""
    leaves = whole(run, {path: leaf for path, leaf in run.trained.items() if is_adapter(path)})
    updates = {}
    for path, a in leaves.items():
        if path[-1] == "lora_a":
            b = leaves[(*path[:-1], "lora_b")]
            for i in range(num_layers):
                updates[f"{module_name(path, i)}.weight"] = (a[i], b[i])
    return updates
