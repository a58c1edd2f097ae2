"""Attaches adapters to the target modules of a model."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from flax import nnx

from sft_jax import adapters
from sft_jax.adapters.lora import LoRA
from sft_jax.config import LoraConfig
from sft_jax.errors import UserError
from sft_jax.models.decoder import Decoder
from sft_jax.models.layers import Linear
from sft_jax.models.moe.experts import ExpertLinear
from sft_jax.models.split import EMBEDDINGS


@cache
def methods() -> dict[str, type[LoRA]]:
    """Returns every adapter method by name, which is the name of its file."""
    names = [module.name for module in pkgutil.iter_modules(adapters.__path__)]
    modules = {name: importlib.import_module(f"{adapters.__name__}.{name}") for name in names}
    return {name: module.METHOD for name, module in modules.items() if hasattr(module, "METHOD")}


def method(name: str) -> type[LoRA]:
    """Returns an adapter method by name.

    Raises:
        UserError: there is no method of that name.
    """
    if name not in methods():
        raise UserError(f"lora.method: {name!r} is not supported; supported are {', '.join(methods())}")
    return methods()[name]


def method_name(variant: object) -> str:
    """Returns the name of an adapter's method."""
    return next(name for name, cls in methods().items() if type(variant) is cls)


def method_from_peft(config: Mapping[str, Any]) -> str:
    """Returns the name of the method that an ``adapter_config.json`` describes."""
    matching = [name for name, cls in methods().items() if all(config.get(key) == on for key, on in cls.PEFT.items())]
    return max(matching, key=lambda name: len(methods()[name].PEFT))


def described(lora: LoraConfig) -> str:
    """Returns the method, rank and alpha of adapters, for people."""
    return f"{method(lora.method).__name__}, rank {lora.rank}, alpha {lora.alpha:g}"


def attach_adapters(model: Decoder, variant: LoRA, targets: str | list[str]) -> list[str]:
    """Attaches an adapter to each target module, in place, and returns the names of these modules.

    ``targets`` follows PEFT: a name matches a module whose dotted path is the name or ends with ``.name``, in all
    decoder layers and outside of them. ``"all-linear"`` means every linear layer except ``lm_head`` and routers; those
    of experts too, each of which gets an adapter of its own.

    Raises:
        UserError: a name matches no linear layer, or is the embeddings or ``lm_head``.
    """
    modules = dict(_linear_modules(model))
    if targets == "all-linear":
        chosen = list(modules)
    else:
        chosen = []
        for target in targets:
            if target.split(".")[-1] in EMBEDDINGS:
                raise UserError(f"lora.target_modules: an adapter on {target!r} is not supported; name decoder modules")
            matched = [name for name in modules if name == target or name.endswith(f".{target}")]
            if not matched:
                known = ", ".join(sorted({name.split(".")[-1] for name in modules}))
                raise UserError(f"lora.target_modules: {target!r} matches no linear layer; this model has {known}")
            chosen += [name for name in matched if name not in chosen]
    if not variant.adapts_experts:
        experts = [name for name in chosen if isinstance(modules[name], ExpertLinear)]
        if experts and targets != "all-linear":
            raise UserError(
                f"lora.target_modules: {experts[0]} is a layer of experts, which {method_name(variant)} cannot adapt"
            )
        chosen = [name for name in chosen if name not in experts]
    for name in chosen:
        variant.attach(modules[name])
    return chosen


def _linear_modules(model: Decoder) -> Iterator[tuple[str, Linear]]:
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Linear) and path[0] not in EMBEDDINGS:
            yield ".".join(map(str, path)), node
