"""Checks the values of an architecture that a family has read: their types, and the bounds within which they work."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from sft_jax.errors import UserError
from sft_jax.models.architecture import Architecture

_LARGEST = 2**31 - 1  # the range of int32, which indices of arrays have
_MOST = 1e30  # of a factor; beyond it float32 is soon infinite
# The keys of config.json under which most families have a value.
_KEYS = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "eps": "rms_norm_eps",
    "theta": "rope_theta",
    "window": "sliding_window",
    "factor": "rope_parameters.factor",
    "kind": "rope_parameters.rope_type",
    "max_positions": "max_position_embeddings",
}
# Values that are divided by, or of which a model has at least one.
_POSITIVE = {"vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "theta"}
_POSITIVE |= {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "window", "chunk"}
_POSITIVE |= {"num_experts", "num_experts_per_token", "num_groups", "conv_size", "key_dim", "value_dim", "state_size"}
_POSITIVE |= {
    "num_key_heads",
    "num_value_heads",
    "max_positions",
    "beta_fast",
    "beta_slow",
    "kv_rank",
    "dims",
    "length",
}
_POSITIVE |= {"logits_softcap", "softcap", "top_groups", "groups", "v_head_dim", "q_rank", "factors", "long_factors"}
_SIGNED = {"beta", "offset"}  # may be negative, like every factor (``…scale``)


def check_architecture(arch: Architecture) -> None:
    """Checks the values of an architecture and of everything in it.

    Raises:
        UserError: a value of another type than its field, one that is not finite, or one out of bounds.
    """
    if not arch.layers:
        raise UserError("num_hidden_layers 0: a model has at least one layer")
    _check_fields(arch, set())


def _check_fields(one: Any, seen: set[int]) -> None:
    """Checks the fields of a dataclass; those that many layers share once."""
    if id(one) in seen:
        return
    seen.add(id(one))
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        if isinstance(field.type, str) and isinstance(value, (bool, int, float, str, list, dict)):
            _check_value(field.name, value, field.type)
        _check_inside(field.name, value, seen)


def _check_inside(name: str, value: Any, seen: set[int]) -> None:
    if dataclasses.is_dataclass(value):
        _check_fields(value, seen)
    elif isinstance(value, tuple):
        for element in value:
            if isinstance(element, float) and math.isnan(element):
                raise UserError(f"{_KEYS.get(name, name)} has a value that is no number")
            if isinstance(element, float) and name in _POSITIVE and element <= 0:
                raise UserError(f"{_KEYS.get(name, name)} has a value of {element}, which has to be positive")
            _check_inside(name, element, seen)


def _check_value(name: str, value: Any, kind: str) -> None:
    key, kinds = _KEYS.get(name, name), kind.split(" | ")
    wanted = next((one for one in ("str", "bool", "int", "float") if one in kinds), None)
    if wanted is None:
        return
    shown = repr(value)[:40]
    good = {"str": str, "bool": bool, "int": int, "float": (int, float)}[wanted]
    if not isinstance(value, good) or (isinstance(value, bool) and wanted != "bool"):
        noun = {"str": "a name", "bool": "true or false", "int": "a whole number", "float": "a number"}[wanted]
        raise UserError(f"{key} {shown} is not {noun}")
    if isinstance(value, (bool, str)):
        return
    if not -_LARGEST <= value <= _LARGEST if wanted == "int" else not -_MOST <= value <= _MOST:
        raise UserError(f"{key} {shown} is too large, or not finite")
    if name in _POSITIVE and value <= 0:
        raise UserError(f"{key} {shown} has to be positive")
    if value < 0 and name not in _SIGNED and not name.endswith(("scale", "multiplier")):
        raise UserError(f"{key} {shown} is negative")
