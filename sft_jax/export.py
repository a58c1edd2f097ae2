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
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax import builtin
from sft_jax.errors import UserError
from sft_jax.hf.card import model_card
from sft_jax.hf.config import read_architecture, read_config, stop_ids
from sft_jax.hf.names import is_stacked, is_transposed, module_name, tensor_names
from sft_jax.hf.peft import save_adapter
from sft_jax.hf.save import save_tensors
from sft_jax.metrics import read_metrics
from sft_jax.models.lora import is_adapter
from sft_jax.runs import Run, open_run


def export(run: str | Path, out: str | Path, form: str | None = None, step: int | None = None) -> Path:
    """Write a run's result to ``out``, which must not exist yet or be empty; it appears whole or not at all.

    Args:
        run: a run folder.
        form: ``adapter`` or ``merged``; by default what was trained.
        step: a checkpoint; by default the last.

    Raises:
        UserError: no such run or step, a folder that is not empty, or an adapter asked of full fine-tuning.
    """
    opened = open_run(run, step)
    out = Path(out)
    form = form or ("merged" if opened.config.lora is None else "adapter")
    if form == "adapter" and opened.config.lora is None:
        raise UserError(f"{run}: was fully fine-tuned, so there is no adapter; use --format merged")
    with _new_folder(out) as folder:
        if form == "adapter":
            _write_adapter(opened, folder)
        else:
            _write_merged(opened, folder)
        _write_generation_config(opened, folder)
        opened.tokenizer.save_pretrained(folder)
        losses = read_metrics(Path(run) / "metrics.jsonl")
        card = model_card(opened.config, form, opened.step, losses, opened.dtype("model.embed_tokens.weight"))
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"{out}: {form} of step {opened.step}, {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.1f} MB")
    return out


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


def _write_adapter(run: Run, folder: Path) -> None:
    lora = run.config.lora
    assert lora is not None
    arch = read_architecture(run.base)
    adapter = {path: leaf for path, leaf in run.params.items() if is_adapter(path)}
    tables = _trained_tensors(run, arch.num_layers)
    save_adapter(
        folder,
        adapter,
        {name: get() for name, (_, get) in tables.items()},
        arch.num_layers,
        lora.rank,
        lora.alpha,
        lora.dropout,
        str(run.base) if run.config.model.path.startswith(builtin.PREFIX) else run.config.model.path,
        run.config.model.revision,
    )


def _write_merged(run: Run, folder: Path) -> None:
    arch = read_architecture(run.base)
    trained = _trained_tensors(run, arch.num_layers)
    updates = _updates(run, arch.num_layers)
    sizes = {name: math.prod(shape) * run.dtype(name).itemsize for name, (shape, _) in trained.items()}
    reader = run.reader
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
        scale = np.float32(run.config.lora.alpha / run.config.lora.rank)  # type: ignore[union-attr]
        return (weight.astype(np.float32) + scale * (a @ b).T).astype(weight.dtype)

    save_tensors(folder, dict(sorted(sizes.items())), get)
    config = read_config(run.base) | {"vocab_size": run.vocab_size}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_generation_config(run: Run, folder: Path) -> None:
    """The base's generation config, with the trained stop tokens first among the eos ids."""
    path = run.base / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ids = list(dict.fromkeys([*run.stop_ids, *stop_ids(run.base)]))
    config["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    (folder / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _trained_tensors(run: Run, num_layers: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Base tensors that were trained: file name to (file shape, a function that makes it in the file dtype)."""
    tensors = {}
    for path, leaf in run.params.items():
        if is_adapter(path):
            continue
        for i, name in enumerate(tensor_names(path, num_layers)):
            layer = leaf[i] if is_stacked(path) else leaf
            layer = layer.T if is_transposed(path) else layer
            dtype = run.dtype(name)
            tensors[name] = (layer.shape, lambda x=layer, dtype=dtype: np.ascontiguousarray(x).astype(dtype))
    return tensors


def _updates(run: Run, num_layers: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Base tensors that an adapter changes: file name to its ``A [in, R]`` and ``B [R, out]``."""
    updates = {}
    for path, a in run.params.items():
        if path[-1] == "lora_a":
            b = run.params[(*path[:-1], "lora_b")]
            for i in range(num_layers):
                updates[f"{module_name(path, i)}.weight"] = (a[i], b[i])
    return updates
