"""Refuses values of config.json that no model has, before anything of their size is made from them."""

from __future__ import annotations

import re
from typing import Any

from sft_jax.errors import UserError

MOST_LAYERS = 2_000
MOST_EXPERTS = 10_000
LARGEST_SIZE = 2**31 - 1  # the range of int32, which indices of arrays have

# Names of sizes and counts, of which some are zero or null where a model lacks something.
_SIZE = re.compile(r"(?:^|_)(?:size|dim|heads?|layers?|experts|rank|window|positions|embeddings|groups?|embd|inner)$")
_LAYERS = re.compile(r"(?:^|_)(?:layers|n_layer)$")
_EXPERTS = re.compile(r"(?:^|_)experts$")
# Sizes that every decoder has, and that transformers divides by or makes lists of.
_NEVER_ZERO = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"}
_NEVER_ZERO |= {"n_embd", "n_head", "n_layer", "n_positions"}


def check_values(config: dict[str, Any], start: str = "") -> None:
    """Checks the sizes and counts of a config and of the configs inside of it.

    Args:
        start: of the names of keys in messages.

    Raises:
        UserError: one is larger than any model's; one that every model has is no positive whole number; a number is not
            finite. All other values are checked where a family has read them.
    """
    for key, value in config.items():
        name = start + key
        if isinstance(value, dict):
            check_values(value, f"{name}.")
        elif isinstance(value, float) and value - value != 0:  # not a number, or infinite
            raise UserError(f"{name} {value} is not finite; set the value of the original model")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and _SIZE.search(key):
            _check_size(name, key, value)


def _check_size(name: str, key: str, value: float) -> None:
    most = MOST_LAYERS if _LAYERS.search(key) else MOST_EXPERTS if _EXPERTS.search(key) else LARGEST_SIZE
    shown = str(value) if abs(value) < 10**20 else "with more than 20 digits"
    if key in _NEVER_ZERO and not (isinstance(value, int) and 1 <= value <= most):
        raise UserError(f"{name} {shown} is not a whole number from 1 to {most:,}")
    if value > most:
        raise UserError(f"{name} {shown} is more than {most:,}")
