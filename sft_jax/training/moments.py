"""Adam with less memory for moments: in bfloat16, or with a factored second moment.

Both replace ``optax.scale_by_adam``, with the same ``b1``, ``b2`` and ``eps``. They compute in float32 and round only
the stored moments, stochastically; see :mod:`sft_jax.training.rounding`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sft_jax.training.rounding import leaf_key, random_words, round_with
from sft_jax.typing import Array, Float


class Rounded(NamedTuple):
    """State with both moments in bfloat16; 4 bytes per weight."""

    num_updates: Array  # int32
    mu: Any
    nu: Any


class Factored(NamedTuple):
    """State with the first moment in bfloat16 and means of squared gradients; a little over 2 bytes per weight."""

    num_updates: Array
    mu: Any
    rows: Any  # [*L, in, 1], float32: mean over out
    columns: Any  # [*L, 1, out], float32: mean over in


def scale_by_rounded_adam(b1: float, b2: float, eps: float, key: Array) -> optax.GradientTransformation:
    """``optax.scale_by_adam`` with both moments stored in bfloat16.

    For noise gradients and b2 = 0.999, the second moment differs from the unrounded one by 4 % (standard deviation; it
    varies by 3 % by itself), its root, which divides the update, by half of that, and the first moment by 0.5 %.
    """

    def init(params: Any) -> Rounded:
        return Rounded(jnp.zeros((), jnp.int32), _zeros(params), _zeros(params))

    def update(updates: Any, state: Rounded, params: Any = None) -> tuple[Any, Rounded]:
        count, correct_mu, correct_nu = _bias_corrections(state.num_updates, b1, b2)
        step_key = jax.random.fold_in(key, count)

        def one(path: Any, grad: Array, mu: Array, nu: Array) -> tuple[Array, ...]:
            mu, nu = _moving_average(mu, grad, b1), _moving_average(nu, grad * grad, b2)
            words = random_words(leaf_key(step_key, path), grad.shape)
            scaled = mu * correct_mu / (jnp.sqrt(nu * correct_nu) + eps)
            return scaled, round_with(mu, words), round_with(nu, words >> jnp.uint32(16))

        scaled, mu, nu = _map_leaves(one, updates, state.mu, state.nu)
        return scaled, Rounded(count, mu, nu)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def scale_by_factored_adam(b1: float, b2: float, eps: float, key: Array) -> optax.GradientTransformation:
    """``optax.scale_by_adam`` with a factored second moment, for leaves that are matrices or stacks of matrices.

    The second moment of an element is ``row · column / mean of rows``, as in Adafactor (Shazeer & Stern 2018, algorithm
    1). It equals Adam's if the squared gradients have rank one. Every matrix of a stack has its own row and column
    means. The bias corrections and the first moment of the gradients are Adam's; the first moment is stored in
    bfloat16. optax has the same estimate, but uses the two largest dimensions of a leaf, which may include the layers.
    """

    def init(params: Any) -> Factored:
        def means(dim: int) -> Any:
            return jax.tree.map(lambda leaf: jnp.zeros(_reduced(leaf.shape, dim), jnp.float32), params)

        return Factored(jnp.zeros((), jnp.int32), _zeros(params), means(-1), means(-2))

    def update(updates: Any, state: Factored, params: Any = None) -> tuple[Any, Factored]:
        count, correct_mu, correct_nu = _bias_corrections(state.num_updates, b1, b2)
        step_key = jax.random.fold_in(key, count)

        def one(path: Any, grad: Array, mu: Array, rows: Array, columns: Array) -> tuple[Array, ...]:
            square = grad * grad
            mu = _moving_average(mu, grad, b1)
            rows = _moving_average(rows, jnp.mean(square, axis=-1, keepdims=True), b2)
            columns = _moving_average(columns, jnp.mean(square, axis=-2, keepdims=True), b2)
            row_scale = rows / jnp.maximum(jnp.mean(rows, axis=-2, keepdims=True), jnp.finfo(jnp.float32).tiny)
            root = jnp.sqrt(row_scale) * jnp.sqrt(columns * correct_nu)  # separate roots: the product may underflow
            words = random_words(leaf_key(step_key, path), grad.shape)
            return mu * correct_mu / (root + eps), round_with(mu, words), rows, columns

        scaled, mu, rows, columns = _map_leaves(one, updates, state.mu, state.rows, state.columns)
        return scaled, Factored(count, mu, rows, columns)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _zeros(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.bfloat16), params)


def _reduced(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    assert len(shape) >= 2, shape
    return tuple(1 if i == dim % len(shape) else size for i, size in enumerate(shape))


def _bias_corrections(count: Array, b1: float, b2: float) -> tuple[Array, Array, Array]:
    """Returns the number of this update, from 1 on, and the bias corrections of both moments."""
    count = jnp.asarray(optax.safe_increment(count))
    t = count.astype(jnp.float32)
    return count, 1 / (1 - jnp.float32(b1) ** t), 1 / (1 - jnp.float32(b2) ** t)


def _moving_average(moment: Array, value: Float[Array, "..."], decay: float) -> Array:
    return decay * moment.astype(jnp.float32) + (1 - decay) * value


def _map_leaves(one: Callable[..., tuple[Array, ...]], updates: Any, *states: Any) -> list[Any]:
    """Maps ``one(path, leaf, *state leaves)`` over every leaf; returns one tree per output."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
    results = [
        one(path, leaf, *rest)
        for (path, leaf), *rest in zip(leaves, *(treedef.flatten_up_to(state) for state in states), strict=True)
    ]
    if not results:  # a label without leaves
        return [updates, *states]
    return [treedef.unflatten(column) for column in zip(*results, strict=True)]
