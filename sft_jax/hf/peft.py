"""Reads and writes PEFT adapter folders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from sft_jax.adapters.attach import method_from_peft, method_name, methods
from sft_jax.adapters.lora import LoRA
from sft_jax.errors import UserError
from sft_jax.files.json_object import read_object
from sft_jax.hf.place import check_finite
from sft_jax.hf.reader import DTYPES, TensorReader
from sft_jax.models.architecture import Architecture
from sft_jax.models.layers import Linear
from sft_jax.models.moe.experts import ExpertLinear
from sft_jax.models.split import EMBEDDINGS, Split, is_adapter
from sft_jax.models.tensors import Stored
from sft_jax.tree import Path as LeafPath
from sft_jax.tree import flatten
from sft_jax.typing import Array

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of tensor names in an adapter's file
MOST_RANK = 65_536
LARGEST_ALPHA = 1_000_000
_FINGERPRINT = "base_fingerprint"  # metadata key in the safetensors file

_MERGE = "; merge it into its base with PEFT (merge_and_unload) and use the merged model"

# PEFT settings that are not supported and change what an adapter computes, with the value that means "off".
_UNSUPPORTED = {
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "bias": "none",
    "layers_to_transform": None,
    "trainable_token_indices": None,
    "lora_bias": False,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_qalora": False,
    "use_dora": False,
}
# Names of the layers of an expert in transformers 4, which PEFT looks for among the target modules.
_EXPERT_LAYERS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# Initializations that do not change the base weights.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """The contents of ``adapter_config.json``."""

    base: str  # folder or Hugging Face id
    revision: str | None
    method: str  # name of a module in sft_jax/adapters
    rank: int
    alpha: float
    target_modules: list[str]


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Reads the adapter config of a PEFT folder.

    Raises:
        UserError: not LoRA, a PEFT setting that is not supported, or a missing key.
    """
    path = folder / "adapter_config.json"
    config = read_object(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {config.get('peft_type')!r} is not LORA")
    known = set().union(*(one.PEFT for one in methods().values()))
    for key in known:
        if not isinstance(config.get(key), bool | None):
            raise UserError(f"{path}: {key}={config[key]!r} is neither true nor false")
    for key, off in _UNSUPPORTED.items():
        if key in known:
            continue
        if config.get(key, off) not in (off, None):
            raise UserError(f"{path}: {key}={config[key]!r} is not supported{_MERGE}")
    if isinstance(init := config.get("init_lora_weights"), (list, dict)) or init not in _INITS:
        raise UserError(
            f"{path}: init_lora_weights={init!r} has changed the base model as well, which is not supported{_MERGE}"
        )
    _check_types(path, config)
    parameters = config.get("target_parameters") or []
    for key in ("r", "lora_alpha", "base_model_name_or_path", *(() if parameters else ("target_modules",))):
        if not config.get(key):
            raise UserError(f"{path}: {key} is missing")
    targets = config.get("target_modules") or []
    return AdapterConfig(
        base=config["base_model_name_or_path"],
        revision=config.get("revision"),
        method=method_from_peft(config),
        rank=config["r"],
        alpha=config["lora_alpha"],
        target_modules=[*targets, *(name.removesuffix(".weight") for name in parameters)],
    )


def _check_types(path: Path, config: dict[str, Any]) -> None:
    """Checks the kinds and bounds of the values that are used; a missing key is another error."""
    for key, most in (("r", MOST_RANK), ("lora_alpha", LARGEST_ALPHA)):
        value = config.get(key) or 1
        kinds = int if key == "r" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= most:
            raise UserError(f"{path}: {key}={str(value)[:40]} is not a positive number of at most {most:,}")
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(value := config.get(key) or "", str) or "\0" in value:
            raise UserError(f"{path}: {key}={str(value)[:40]!r} is not a name")
    for key in ("target_modules", "target_parameters"):
        names = config.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(
                f"{path}: {key}={str(names)[:80]!r} is not supported; it must be a list of module names{_MERGE}"
            )


def base_fingerprint(folder: Path) -> str | None:
    """Reads the base model's fingerprint (:meth:`TensorReader.fingerprint`); None in files of other libraries."""
    found = TensorReader(folder, ADAPTER_FILE).metadata.get(_FINGERPRINT)
    return found if isinstance(found, str) and re.fullmatch("[0-9a-f]+:[0-9a-f]+", found) else None


def num_embeddings(folder: Path, arch: Architecture) -> int | None:
    """Number of embeddings in an adapter's file; None if it has none."""
    reader = TensorReader(folder, ADAPTER_FILE)
    name = PREFIX + arch.in_modules(arch.embeddings_tensor)
    return reader.shape(name)[0] if name in reader.names else None


def load_adapter(folder: str, split: Split, embeddings: bool = False) -> dict[LeafPath, Array]:
    """Reads the adapter parameters of a network from a PEFT folder, and its embeddings if the folder has them.

    Args:
        split: the network; trained embeddings are read from the folder if it has them.
        embeddings: whether to read frozen embeddings too.

    Raises:
        UserError: not an adapter folder; another method, rank, alpha or target modules; or a PEFT setting that is not
            supported.
    """
    path = Path(folder).expanduser()
    if not (path / "adapter_config.json").is_file():
        raise UserError(f"lora.init_from: {path} has no adapter_config.json; it must be a PEFT adapter folder")
    _check_settings(path, read_adapter_config(path), split.variant)
    reader = TensorReader(path, ADAPTER_FILE)
    leaves = flatten(split.trainable) | (flatten(split.frozen) if embeddings else {})
    names = {}
    for leaf_path in leaves:
        in_file = names_in_adapter(split, leaf_path) if leaf_path in split.stored else []
        if is_adapter(split.labels[leaf_path]) or (leaf_path[0] in EMBEDDINGS and reader.names.issuperset(in_file)):
            names[leaf_path] = in_file
    wanted = {name for in_file in names.values() for name in in_file}
    for missing in sorted(wanted - reader.names)[:1]:
        raise UserError(f"{path}: tensor {missing} is missing; check that lora.target_modules matches this adapter")
    for extra in sorted(reader.names - wanted)[:1]:
        if extra in [PREFIX + split.arch.in_modules(one) for one in _of_vocabulary(split.arch)]:
            raise UserError(f"{path}: has embeddings of added tokens; list these tokens in data.added_tokens")
        raise UserError(f"{path}: tensor {extra} has no place; add its module to lora.target_modules")
    return {
        leaf_path: _load(reader, in_file, leaves[leaf_path], split.stored[leaf_path])
        for leaf_path, in_file in names.items()
    }


def _of_vocabulary(arch: Architecture) -> tuple[str, str]:
    return arch.embeddings_tensor, arch.lm_head_tensor


def names_in_adapter(split: Split, path: LeafPath) -> list[str]:
    """Returns the tensor names of an adapter parameter, the embeddings or ``lm_head`` in an adapter's file."""
    names = split.stored[path].names
    return [PREFIX + (split.arch.in_modules(name) if path[0] in EMBEDDINGS else name) for name in names]


def _check_settings(path: Path, config: AdapterConfig, variant: Any) -> None:
    ours = {"method": method_name(variant), "rank": variant.rank, "alpha": variant.alpha}
    for key, one in ours.items():
        other = getattr(config, key)
        if one != other:
            raise UserError(f"lora.{key}: {one} is set, but the adapter in {path} has {other}; set lora.{key}={other}")


def _load(reader: TensorReader, names: list[str], leaf: jax.ShapeDtypeStruct, stored: Stored) -> Array:
    """Reads the tensors of a parameter and stacks them into a sharded array of its dtype."""
    shape = stored.shape(leaf.shape)
    for name in names:
        if reader.shape(name) != shape:
            raise UserError(
                f"{reader.folder}: tensor {name} is made for another model: {reader.shape(name)}, this one has {shape}"
            )
        if reader.dtype(name) not in [np.dtype(dtype) for dtype in DTYPES.values()]:
            raise UserError(f"{reader.folder}: tensor {name} has dtype {reader.dtype(name)}, which no adapter has")
    tensors = [reader.read(name) for name in names]
    for name, tensor in zip(names, tensors, strict=True):
        check_finite(reader, name, tensor)
    stacked = np.stack([stored.element(tensor, leaf.shape[len(stored.stack) :]) for tensor in tensors])
    whole = stacked.reshape(leaf.shape).astype(leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: whole[index])


def targets(split: Split) -> tuple[set[str], set[str]]:
    """Returns the target modules and the target parameters that PEFT adapts as this network is adapted.

    Experts are parameters of transformers' modules. In a model with experts, other linear layers with the names of an
    expert's former layers are named as parameters too: PEFT would rename such target modules to parameters of experts.
    """
    modules, parameters, of_experts = set(), set(), False
    for path, node in nnx.iter_graph(split.abstract().layers):
        if isinstance(node, Linear) and node.variant is not None:
            *_, parent, name = map(str, path)
            if isinstance(node, ExpertLinear):
                parameters.add(f"{parent}.{name}")
            else:
                modules.add((parent, name))
        of_experts |= isinstance(node, ExpertLinear)
    renamed = {(parent, name) for parent, name in modules if of_experts and name in _EXPERT_LAYERS}
    parameters |= {f"{parent}.{name}.weight" for parent, name in renamed}
    return {name for _, name in modules - renamed}, parameters


def save_adapter(
    folder: Path,
    tensors: dict[str, np.ndarray],
    variant: LoRA,
    target_modules: Iterable[str],
    target_parameters: Iterable[str],
    base_model: str,
    revision: str | None = None,
    fingerprint: str | None = None,
    fan_in_fan_out: bool = False,
    within: str | None = None,
) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` to an existing folder.

    Args:
        tensors: tensors by name without PEFT's prefix: adapter weights (float32), and base weights that were trained
            (resized embeddings).
        target_modules, target_parameters: see :func:`targets`.
        fingerprint: fingerprint of the base's weights, to detect another base of the same shapes.
        fan_in_fan_out: whether the base stores linear layers as ``[in, out]``.
        within: start of the names of all adapted modules, if modules elsewhere have target modules too.
    """
    metadata = {"format": "pt"} | ({} if fingerprint is None else {_FINGERPRINT: fingerprint})
    save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, folder / ADAPTER_FILE, metadata=metadata)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": variant.rank,
        "lora_alpha": variant.alpha,
        "lora_dropout": 0.0 if target_parameters else variant.dropout,  # PEFT has no dropout on parameters
        "target_modules": sorted(target_modules),
        "target_parameters": sorted(target_parameters) or None,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "modules_to_save": None,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    if within is not None:  # a vision tower also has a q_proj, which PEFT would give an untrained adapter
        config["exclude_modules"] = f"(?!{re.escape(within)}).*"
    config |= variant.PEFT
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
