"""The name table between the network and Hugging Face: nearly the identity.

``layers.self_attn.q_proj.kernel`` ``[L, in, out]`` is ``model.layers.{i}.self_attn.q_proj.weight`` ``[out, in]``.
"""

from __future__ import annotations

from sft_jax.tree import Path

_LAST = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
_ADAPTER_LAST = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


def is_stacked(path: Path) -> bool:
    """Whether a leaf holds all layers, and so stands for one tensor a layer."""
    return path[0] == "layers"


def is_transposed(path: Path) -> bool:
    """Whether a leaf is ``[in, out]`` where the file has ``[out, in]``."""
    return path[-1] in ("kernel", "lora_a", "lora_b")


def module_name(path: Path, layer: int | None = None) -> str:
    """The dotted module a leaf belongs to: ``model.layers.3.self_attn.q_proj``, ``lm_head``."""
    modules = list(path[:-1])
    if is_stacked(path):
        modules.insert(1, str(layer))
    return ".".join(modules if path[0] == "lm_head" else ["model", *modules])


def tensor_names(path: Path, num_layers: int) -> list[str]:
    """The file tensors of a base leaf, one a layer where it is stacked."""
    layers = range(num_layers) if is_stacked(path) else [None]
    return [f"{module_name(path, layer)}.{_LAST[path[-1]]}" for layer in layers]


def adapter_names(path: Path, num_layers: int) -> list[str]:
    """The PEFT tensors of an adapter leaf, one a layer."""
    return [f"base_model.model.{module_name(path, i)}.{_ADAPTER_LAST[path[-1]]}" for i in range(num_layers)]
