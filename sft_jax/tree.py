"""Conversion between nested dicts and flat dicts keyed by path."""

from __future__ import annotations

from typing import Any

Params = dict[str, Any]
"""A nested dict of arrays; the keys are the attribute names of the model."""

Path = tuple[str, ...]
"""The keys that lead to a leaf of a nested dict: ``("layers", "0", "self_attn", "q_proj", "weight")``."""


def flatten(tree: Params) -> dict[Path, Any]:
    """``{"a": {"b": 1}}`` → ``{("a", "b"): 1}``."""
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        leaves = flatten(value) if isinstance(value, dict) else {(): value}
        flat |= {(key, *path): leaf for path, leaf in leaves.items()}
    return flat


def unflatten(flat: dict[Path, Any]) -> Params:
    """The inverse of :func:`flatten`."""
    tree: Params = {}
    for (*parents, last), leaf in flat.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
