"""From logits to the next token."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from sft_jax.errors import UserError
from sft_jax.typing import Array, Float, Int


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token always (greedy).
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together have probability p (nucleus sampling, Holtzman et al. 2019).
        seed: of the draw.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature: {self.temperature} is negative; 0 is greedy")
        if self.top_k < 0:
            raise UserError(f"top-k: {self.top_k} is negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p: {self.top_p} is not in (0, 1]; 1 keeps all tokens")

    @property
    def numbers(self) -> tuple[Array, Array, Array]:
        """Temperature, top_k and top_p as arrays: other values need no other program."""
        return jnp.float32(self.temperature), jnp.int32(self.top_k), jnp.float32(self.top_p)


def filter_logits(logits: Float[Array, "V"], temperature: Array, top_k: Array, top_p: Array) -> Float[Array, "V"]:
    """Logits divided by the temperature, those of tokens that may not be drawn at -inf.

    Temperature, then top-k, then top-p on what is left: the order and the edges (ties with the k-th token stay, the
    token that reaches p stays) of transformers' logits warpers.
    """
    logits = logits / temperature
    descending = jnp.sort(logits)[::-1]
    rank = jnp.arange(logits.shape[0])
    kept = jnp.where((top_k == 0) | (rank < top_k), descending, -jnp.inf)
    lowest = descending[jnp.where(top_k == 0, logits.shape[0], jnp.minimum(top_k, logits.shape[0])) - 1]
    probability = jax.nn.softmax(kept)
    before = jnp.cumsum(probability) - probability
    reached = jnp.min(jnp.where((before < top_p) & (kept > -jnp.inf), descending, jnp.inf))
    return jnp.where(logits >= jnp.maximum(lowest, jnp.where(top_p < 1, reached, -jnp.inf)), logits, -jnp.inf)


def sample(logits: Float[Array, "B V"], keys: Array, temperature: Array, top_k: Array, top_p: Array) -> Int[Array, "B"]:
    """The next token of each row; every row has its own key, so what it draws does not depend on its neighbours."""

    def draw(logits: Array) -> Array:
        filtered = jax.vmap(lambda row: filter_logits(row, temperature, top_k, top_p))(logits)
        return jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)

    def greedy(logits: Array) -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return lax.cond(temperature > 0, draw, greedy, logits)
