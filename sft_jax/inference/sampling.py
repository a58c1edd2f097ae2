"""Samples the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from sft_jax.errors import UserError
from sft_jax.typing import Array, Float, Int


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Args:
        temperature: divides the logits; 0 for greedy decoding.
        top_k: sample from the k most likely tokens; 0 for all.
        top_p: sample from the most likely tokens with total probability p (nucleus sampling, Holtzman et al. 2019).
        seed: seed for sampling.
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
        """Temperature, top_k and top_p as arrays, so that other values need no recompilation."""
        return jnp.float32(self.temperature), jnp.int32(self.top_k), jnp.float32(self.top_p)


def filter_logits(logits: Float[Array, "V"], temperature: Array, top_k: Array, top_p: Array) -> Float[Array, "V"]:
    """Divides logits by the temperature and sets those of excluded tokens to -inf.

    Applies temperature, then top-k, then top-p on the remaining tokens, as the logits warpers of transformers do. Ties
    with the k-th token stay, and so does the token that reaches p.
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
    """Samples the next token of each sequence. Each has its own key, so samples do not depend on other sequences."""

    def draw(logits: Array) -> Array:
        filtered = jax.vmap(lambda row: filter_logits(row, temperature, top_k, top_p))(logits)
        return jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)

    def greedy(logits: Array) -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return lax.cond(temperature > 0, draw, greedy, logits)
