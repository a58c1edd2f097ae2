"""A run as a Hugging Face folder: a PEFT adapter, or a whole model with the adapter merged in.

Tensors are made one at a time from the base model's files and the run's trained leaves: base weights that were not
trained are copied bit by bit, and no network is built.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sft_jax import config as configs
from sft_jax.checkpoint import Checkpoints
from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.hf.card import model_card
from sft_jax.hf.config import read_architecture, read_config, stop_ids
from sft_jax.hf.hub import find_model
from sft_jax.hf.names import adapter_names, is_stacked, is_transposed, module_name, tensor_names
from sft_jax.hf.peft import save_adapter
from sft_jax.hf.reader import TensorReader
from sft_jax.hf.save import save_tensors
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.metrics import read_metrics
from sft_jax.models.lora import is_adapter
from sft_jax.tree import Path as LeafPath
from sft_jax.tree import flatten


def export(run: str | Path, out: str | Path, form: str | None = None, step: int | None = None) -> Path:
    """Write a run's result to ``out``, which must not exist yet or be empty; it appears whole or not at all.

    Args:
        run: a run folder.
        form: ``adapter`` or ``merged``; by default what was trained.
        step: a checkpoint; by default the last.

    Raises:
        UserError: no such run or step, a folder that is not empty, or an adapter asked of full fine-tuning.
    """
    source = _open_run(Path(run), step)
    out = Path(out)
    form = form or ("merged" if source.config.lora is None else "adapter")
    if form == "adapter" and source.config.lora is None:
        raise UserError(f"{run}: was fully fine-tuned, so there is no adapter; use --format merged")
    with _new_folder(out) as folder:
        if form == "adapter":
            _write_adapter(source, folder)
        else:
            _write_merged(source, folder)
        source.tokenizer.save_pretrained(folder)
        losses = read_metrics(Path(run) / "metrics.jsonl")
        card = model_card(source.config, form, source.step, losses, source.base_dtype)
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"{out}: {form} of step {source.step}, {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.1f} MB")
    return out


@dataclass(frozen=True)
class _Source:
    """What a run left, opened for export."""

    config: Config
    step: int
    params: dict[LeafPath, np.ndarray]  # trained leaves
    base: Path
    reader: TensorReader | None  # None where the base is random weights, all of which were trained
    tokenizer: Any
    stop_ids: list[int]
    vocab_size: int

    @property
    def base_dtype(self) -> np.dtype:
        """The dtype that trained base tensors are written in: that of the base model's files."""
        if self.reader is not None:
            return self.reader.dtype("model.embed_tokens.weight")
        config = read_config(self.base)
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
        return np.dtype({"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[name])


def _open_run(run: Path, step: int | None) -> _Source:
    if not (run / "config.yaml").is_file() or not (run / "checkpoints").is_dir():
        raise UserError(f"{run}: not a run folder; it has no config.yaml and checkpoints")
    config = configs.load(run / "config.yaml")
    checkpoints = Checkpoints(run / "checkpoints", config.training.keep_checkpoints)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{run}: has no checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(f"{run}: has no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    identity = checkpoints.run(step)
    base = find_model(config.model.path, config.model.revision)
    reader = TensorReader(base) if config.model.init == "pretrained" else None
    if reader is not None and reader.fingerprint() != identity["base"]:
        raise UserError(f"{base}: the base model has changed since {run} was trained")
    params = flatten(checkpoints.restore_params(step))
    checkpoints.close()
    tokenizer, _ = load_tokenizer(run / "tokenizer")
    return _Source(config, step, params, base, reader, tokenizer, identity["stop_ids"], identity["vocab_size"])


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name at the end; removed if anything fails before."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; name another one")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())  # temporary folders, and safetensors, are made for the owner alone
        for file in partial.iterdir():
            file.chmod(0o666 & ~_umask())
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_adapter(source: _Source, folder: Path) -> None:
    lora = source.config.lora
    assert lora is not None
    arch = read_architecture(source.base)
    adapter = {path: leaf for path, leaf in source.params.items() if is_adapter(path)}
    tables = _trained_tensors(source, arch.num_layers)
    save_adapter(
        folder,
        adapter,
        {name: get() for name, (_, get) in tables.items()},
        arch.num_layers,
        lora.rank,
        lora.alpha,
        lora.dropout,
        source.config.model.path,
        source.config.model.revision,
    )


def _write_merged(source: _Source, folder: Path) -> None:
    arch = read_architecture(source.base)
    trained = _trained_tensors(source, arch.num_layers)
    updates = _updates(source, arch.num_layers)
    dtype = source.base_dtype
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, _) in trained.items()}
    reader = source.reader
    if reader is not None:
        untrained = reader.names - set(trained)
        if arch.tie_word_embeddings and "model.embed_tokens.weight" in trained:
            untrained -= {"lm_head.weight"}  # some tied models carry a copy of the table, which is now out of date
        sizes |= {name: math.prod(reader.shape(name)) * reader.dtype(name).itemsize for name in untrained}

    def get(name: str) -> np.ndarray:
        if name in trained:
            return trained[name][1]()
        assert reader is not None
        weight = reader.read(name)
        if name not in updates:
            return weight
        a, b = updates[name]
        if not b.any():  # adding zero would turn -0.0 into 0.0
            return weight
        scale = np.float32(source.config.lora.alpha / source.config.lora.rank)  # type: ignore[union-attr]
        return (weight.astype(np.float32) + scale * (a @ b).T).astype(weight.dtype)

    save_tensors(folder, dict(sorted(sizes.items())), get)
    config = read_config(source.base) | {"vocab_size": source.vocab_size}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_generation_config(source, folder)


def _write_generation_config(source: _Source, folder: Path) -> None:
    """The base's generation config, with the trained stop tokens first among the eos ids."""
    path = source.base / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ids = list(dict.fromkeys([*source.stop_ids, *stop_ids(source.base)]))
    config["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    (folder / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _trained_tensors(source: _Source, num_layers: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Base tensors that were trained: file name to (file shape, a function that makes it in the file dtype)."""
    tensors = {}
    for path, leaf in source.params.items():
        if is_adapter(path):
            continue
        for i, name in enumerate(tensor_names(path, num_layers)):
            layer = leaf[i] if is_stacked(path) else leaf
            layer = layer.T if is_transposed(path) else layer
            tensors[name] = (layer.shape, lambda layer=layer: np.ascontiguousarray(layer).astype(source.base_dtype))
    return tensors


def _updates(source: _Source, num_layers: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Base tensors that an adapter changes: file name to its ``A [in, R]`` and ``B [R, out]``."""
    updates = {}
    for path, a in source.params.items():
        if path[-1] == "lora_a":
            b = source.params[(*path[:-1], "lora_b")]
            for i in range(num_layers):
                updates[f"{module_name(path, i)}.weight"] = (a[i], b[i])
    assert len(updates) == sum(len(adapter_names(p, num_layers)) for p in source.params if p[-1] == "lora_a")
    return updates
