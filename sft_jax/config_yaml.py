"""Checks a YAML text before its values are built: aliases may expand without end, and nesting may be too deep."""

from __future__ import annotations

from typing import Any

from sft_jax.errors import UserError

BYTES = 1 << 20  # of a config file
VALUES = 100_000  # keys and values, with every alias expanded
DEPTH = 50


def check_yaml(text: str, name: str) -> None:
    """Check that a text has few values, also after its aliases are expanded, and that no value contains itself.

    Raises:
        UserError: it does not.
        yaml.YAMLError: the text is not valid YAML.
    """
    import yaml

    if len(text) > BYTES:
        raise UserError(f"{name}: has more than {BYTES >> 20} MB, so it is no config")
    depth = 0
    for token in yaml.parse(text):  # before they are composed, which recurs
        depth += isinstance(token, yaml.CollectionStartEvent) - isinstance(token, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise UserError(f"{name}: is nested more than {DEPTH} levels deep")
    sizes: dict[int, int] = {}
    if (root := yaml.compose(text)) is not None and _size(root, sizes, name) > VALUES:
        raise UserError(f"{name}: has more than {VALUES:,} values, with its aliases expanded")


def _size(node: Any, sizes: dict[int, int], name: str) -> int:
    """Return the number of values below a node; counts those of an alias each time, but looks at them once."""
    if not isinstance(node.value, list):
        return 1
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise UserError(f"{name}: a value contains itself, by an alias")
        return sizes[id(node)]
    sizes[id(node)] = 0
    below = [one for pair in node.value for one in (pair if isinstance(pair, tuple) else (pair,))]
    sizes[id(node)] = 1 + sum(_size(one, sizes, name) for one in below)
    return sizes[id(node)]
