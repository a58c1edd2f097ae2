"""The inputs and cotangents of functions with a custom gradient and symbolic zeros."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from sft_jax.typing import Array


def values_and_perturbed(primals: Any) -> tuple[Any, Any]:
    """Returns the values of the inputs of a forward rule, and which of them need a gradient."""

    def is_primal(node: Any) -> bool:
        return hasattr(node, "perturbed")

    values = jax.tree.map(lambda leaf: leaf.value, primals, is_leaf=is_primal)
    return values, jax.tree.map(lambda leaf: leaf.perturbed, primals, is_leaf=is_primal)


def instantiate(cotangent: Any) -> Array:
    """Returns the cotangent of an output as an array; a symbolic zero becomes zeros."""
    if isinstance(cotangent, SymbolicZero):
        aval: Any = cotangent.aval
        return jnp.zeros(aval.shape, aval.dtype)
    return cotangent
