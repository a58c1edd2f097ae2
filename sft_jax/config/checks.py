"""Checks of values that name the key."""

from __future__ import annotations

from sft_jax.errors import UserError


def require(condition: bool, key: str, problem: str) -> None:
    """Raise a UserError about a key unless the condition holds."""
    if not condition:
        raise UserError(f"{key}: {problem}")


def one_of(value: str, key: str, choices: tuple[str, ...]) -> None:
    """Raise a UserError unless the value of a key is one of the choices."""
    require(value in choices, key, f"{value!r} is not one of {', '.join(choices)}")
