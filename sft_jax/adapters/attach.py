"""Which method, and which layers: adapters put beside the linear layers that a config names."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from flax import nnx

from sft_jax import adapters
from sft_jax.adapters.lora import LoRA
from sft_jax.errors import UserError
from sft_jax.models.decoder import Decoder
from sft_jax.models.layers import Linear
from sft_jax.models.split import EMBEDDINGS


@cache
def methods() -> dict[str, type[LoRA]]:
    """Every method by its name, which is that of its file."""
    names = [module.name for module in pkgutil.iter_modules(adapters.__path__)]
    found = {name: importlib.import_module(f"{adapters.__name__}.{name}") for name in names}
    return {name: module.METHOD for name, module in found.items() if hasattr(module, "METHOD")}


def method(name: str) -> type[LoRA]:
    """A method by its name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in methods():
        raise UserError(f"lora.method: {name!r} is none of {', '.join(methods())}")
    return methods()[name]


def method_name(variant: object) -> str:
    """The name of a variant's method."""
    return next(name for name, one in methods().items() if type(variant) is one)


def method_of_peft(config: Mapping[str, Any]) -> str:
    """The name of the method that the settings of an ``adapter_config.json`` tell."""
    fitting = [name for name, one in methods().items() if all(config.get(key) == on for key, on in one.PEFT.items())]
    return max(fitting, key=lambda name: len(methods()[name].PEFT))


def attach_adapters(model: Decoder, variant: LoRA, targets: str | list[str]) -> list[str]:
    """Put an adapter beside each targeted linear layer, in place; returns the names of the adapted modules.

    ``targets`` follows PEFT: ``"all-linear"`` means every linear layer but ``lm_head``; a name matches a module whose
    dotted path is the name or ends with ``.name``. A decoder layer's modules stand for those of all layers.

    Raises:
        UserError: a name matches nothing, or names the embeddings or ``lm_head``.
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
    for name in chosen:
        variant.attach(modules[name])
    return chosen


def _linear_modules(model: Decoder) -> Iterator[tuple[str, Linear]]:
    for path, node in nnx.iter_graph(model.layers):
        if isinstance(node, Linear):
            yield ".".join(map(str, ("layers", *path))), node
