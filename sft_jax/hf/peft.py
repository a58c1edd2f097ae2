"""PEFT adapter folders: read one to continue from, write one to load anywhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sft_jax.errors import UserError
from sft_jax.hf.names import adapter_names, is_stacked, is_transposed, tensor_names
from sft_jax.hf.reader import TensorReader
from sft_jax.tree import Path as LeafPath
from sft_jax.typing import Array

_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OF_BASE = "base_fingerprint"  # in the metadata of the file

_MERGE = "; merge it into its base with PEFT (merge_and_unload), and give the merged model"

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
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_qalora": False,
    "target_parameters": None,
}
# Of the ways in which an adapter may begin, those that leave the base model as it is.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """What ``adapter_config.json`` says."""

    base: str  # folder or Hugging Face id
    revision: str | None
    rank: int
    alpha: float
    target_modules: list[str]


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The adapter config of a PEFT folder.

    Raises:
        UserError: not LoRA, a PEFT setting that is not supported, or a key that is missing.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {config.get('peft_type')!r} is not LORA")
    for key, off in _UNSUPPORTED.items():
        if config.get(key, off) not in (off, None):
            raise UserError(f"{path}: {key}={config[key]!r} is not supported{_MERGE}")
    if (init := config.get("init_lora_weights")) not in _INITS:
        raise UserError(
            f"{path}: init_lora_weights={init!r} has changed the base model as well, which is not supported{_MERGE}"
        )
    for key in ("r", "lora_alpha", "target_modules", "base_model_name_or_path"):
        if not config.get(key):
            raise UserError(f"{path}: {key} is missing")
    targets = config["target_modules"]
    if not isinstance(targets, list):
        raise UserError(
            f"{path}: target_modules={targets!r} is not supported; it must be a list of module names{_MERGE}"
        )
    return AdapterConfig(
        config["base_model_name_or_path"], config.get("revision"), config["r"], config["lora_alpha"], targets
    )


def base_fingerprint(folder: Path) -> str | None:
    """Of the base's weights that an adapter was trained on (:meth:`TensorReader.fingerprint`); None of others' ones."""
    try:
        with safe_open(folder / _FILE, "np") as file:
            return (file.metadata() or {}).get(_OF_BASE)
    except (OSError, SafetensorError):
        return None  # whoever reads its tensors says what is wrong with it


def token_rows(folder: Path) -> int | None:
    """How many rows the token table has that an adapter carries whole; None where it carries none."""
    reader = TensorReader(folder, _FILE)
    name = f"{_PREFIX}model.embed_tokens.weight"
    return reader.shape(name)[0] if name in reader.names else None


def load_adapter(
    folder: str, abstract: dict[LeafPath, jax.ShapeDtypeStruct], num_layers: int, rank: int, alpha: float
) -> dict[LeafPath, Array]:
    """Leaves of ``abstract`` from a PEFT folder: all adapters, and the token table and head where it carries them.

    Raises:
        UserError: not an adapter folder, another rank, alpha or set of modules, or an unsupported PEFT setting.
    """
    path = Path(folder).expanduser()
    if not (path / "adapter_config.json").is_file():
        raise UserError(f"lora.init_from: {path} has no adapter_config.json; it must be a PEFT adapter folder")
    config = read_adapter_config(path)
    for key, ours, theirs in (("rank", rank, config.rank), ("alpha", alpha, config.alpha)):
        if ours != theirs:
            raise UserError(f"lora.{key}: {ours} is set, the adapter in {path} has {theirs}; set lora.{key}={theirs}")
    reader = TensorReader(path, _FILE)
    names = {}
    for leaf_path in abstract:
        if is_stacked(leaf_path):
            names[leaf_path] = adapter_names(leaf_path, num_layers)
        else:
            whole = [_PREFIX + name for name in tensor_names(leaf_path, num_layers)]
            if whole[0] in reader.names:
                names[leaf_path] = whole
    wanted = {name for of_leaf in names.values() for name in of_leaf}
    for missing in sorted(wanted - reader.names)[:1]:
        raise UserError(f"{path}: tensor {missing} is missing; does lora.target_modules fit this adapter?")
    for extra in sorted(reader.names - wanted)[:1]:
        if extra.startswith((f"{_PREFIX}model.embed_tokens", f"{_PREFIX}lm_head")):
            raise UserError(f"{path}: carries a token table with added tokens; name them in data.added_tokens")
        raise UserError(f"{path}: tensor {extra} has no place; add its module to lora.target_modules")
    loaded = {}
    for leaf_path, of_leaf in names.items():
        leaf = abstract[leaf_path]
        shape = leaf.shape[1:] if is_stacked(leaf_path) else leaf.shape
        layers = [reader.read(name).T if is_transposed(leaf_path) else reader.read(name) for name in of_leaf]
        for name, layer in zip(of_leaf, layers, strict=True):
            if layer.shape != shape:
                raise UserError(f"{path}: tensor {name} is made for another model: {layer.shape}, this one has {shape}")
        stacked = (np.stack(layers) if is_stacked(leaf_path) else layers[0]).astype(leaf.dtype)
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
    fingerprint: str | None = None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` (float32) into an existing folder.

    Args:
        leaves: adapter leaves, ``lora_a [L, in, R]`` and ``lora_b [L, R, out]``.
        extra: whole base tensors that were trained too (a resized token table), by Hugging Face name.
        fingerprint: of the base's weights, so that others of the same shapes are not taken for them.
    """
    tensors = {_PREFIX + name: value for name, value in extra.items()}
    for path, leaf in leaves.items():
        for name, layer in zip(adapter_names(path, num_layers), leaf, strict=True):
            tensors[name] = np.ascontiguousarray(layer.T.astype(np.float32))
    metadata = {"format": "pt"} | ({} if fingerprint is None else {_OF_BASE: fingerprint})
    save_file(tensors, folder / _FILE, metadata=metadata)
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
