"""PEFT adapter folders: read one to continue from, write one to load anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from sft_jax.errors import UserError
from sft_jax.hf.names import adapter_names
from sft_jax.hf.reader import TensorReader
from sft_jax.tree import Path as LeafPath
from sft_jax.typing import Array

# Settings that change what an adapter computes and that this library does not have, with the value that means "off".
_UNSUPPORTED = {
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "layers_to_transform": None,
    "trainable_token_indices": None,
    "lora_bias": False,
}


def load_adapter(
    folder: str, abstract: dict[LeafPath, jax.ShapeDtypeStruct], num_layers: int, rank: int, alpha: float
) -> dict[LeafPath, Array]:
    """The adapter leaves of ``abstract`` from a PEFT folder.

    Raises:
        UserError: not an adapter folder, another rank, alpha or set of modules, or an unsupported PEFT setting.
    """
    path = Path(folder)
    config_file = path / "adapter_config.json"
    if not config_file.is_file():
        raise UserError(f"lora.init_from: {path} has no adapter_config.json; it must be a PEFT adapter folder")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise UserError(f"{config_file}: peft_type {config.get('peft_type')!r} is not LORA")
    for key, off in _UNSUPPORTED.items():
        if config.get(key, off) not in (off, None):
            raise UserError(f"{config_file}: {key}={config[key]!r} is not supported")
    for key, ours, theirs in (("rank", rank, config["r"]), ("alpha", alpha, config["lora_alpha"])):
        if ours != theirs:
            raise UserError(f"lora.{key}: {ours} is set, the adapter in {path} has {theirs}; set lora.{key}={theirs}")
    reader = TensorReader(path, "adapter_model.safetensors")
    wanted = {name for leaf_path in abstract for name in adapter_names(leaf_path, num_layers)}
    for missing in sorted(wanted - reader.names)[:1]:
        raise UserError(f"{path}: tensor {missing} is missing; does lora.target_modules fit this adapter?")
    for extra in sorted(reader.names - wanted)[:1]:
        raise UserError(f"{path}: tensor {extra} has no place; add its module to lora.target_modules")
    loaded = {}
    for leaf_path, leaf in abstract.items():
        layers = [reader.read(name).T for name in adapter_names(leaf_path, num_layers)]
        for layer in layers:
            if layer.shape != leaf.shape[1:]:
                name = ".".join(leaf_path)
                raise UserError(f"{path}: {name} has shape {layer.shape}, this model asks for {leaf.shape[1:]}")
        stacked = np.stack(layers).astype(leaf.dtype)
        loaded[leaf_path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index, x=stacked: x[index])
    return loaded


def save_adapter(
    folder: Path,
    leaves: dict[LeafPath, np.ndarray],
    extra: dict[str, np.ndarray],
    num_layers: int,
    rank: int,
    alpha: float,
    dropout: float,
    base_model: str,
    revision: str | None = None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` (float32) into an existing folder.

    Args:
        leaves: adapter leaves, ``lora_a [L, in, R]`` and ``lora_b [L, R, out]``.
        extra: whole base tensors that were trained too (a resized token table), by Hugging Face name.
    """
    tensors = {f"base_model.model.{name}": value for name, value in extra.items()}
    for path, leaf in leaves.items():
        for name, layer in zip(adapter_names(path, num_layers), leaf, strict=True):
            tensors[name] = np.ascontiguousarray(layer.T.astype(np.float32))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted({path[-2] for path in leaves}),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
