"""The inverse of a unit lower triangular matrix, by products of matrices only."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sft_jax.typing import Array, Float

_BLOCK = 16
_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@jax.custom_vjp
def unit_lower_inverse(a: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
    """Returns ``(I + a)⁻¹`` for a strictly lower triangular ``a``; C is a power of two.

    Inverts blocks on the diagonal and combines them in pairs. It is as accurate as substitution; the shorter product
    ``Π (I + (-a)^(2^i))`` is not, because the powers become large if keys are alike.
    """
    size = a.shape[-1]
    assert size & (size - 1) == 0, size
    if size <= _BLOCK:
        return _small_inverse(a)
    half = size // 2
    diagonal = unit_lower_inverse(jnp.stack([a[..., :half, :half], a[..., half:, half:]]))
    first, second = diagonal[0], diagonal[1]
    corner = -_matmul(_matmul(second, a[..., half:, :half]), first)
    above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def _small_inverse(a: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
    """The same for blocks that are too small to cut: masks select the corner of each pair of blocks."""
    size = a.shape[-1]
    row, column = np.indices((size, size))
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=a.dtype), a.shape)
    block = 1
    while block < size:
        is_corner = (row // block == column // block + 1) & (row // (2 * block) == column // (2 * block))
        corner = jnp.where(is_corner, a, 0.0)
        inverse -= corner if block == 1 else _matmul(_matmul(inverse, corner), inverse)
        block *= 2
    return inverse


def _forward(a: Array) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(a)
    return inverse, inverse


def _backward(inverse: Array, d_inverse: Array) -> tuple[Array]:
    transposed = jnp.swapaxes(inverse, -1, -2)
    return (-_matmul(_matmul(transposed, d_inverse), transposed),)


unit_lower_inverse.defvjp(_forward, _backward)
