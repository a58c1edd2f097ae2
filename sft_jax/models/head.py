"""The output projection, in the layout its weights have."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from sft_jax.models.quantized import Matrix, in_dtype
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Head:
    """Hidden states to logits: a kernel ``[D, V]``, or the token table ``[V, D]`` where the two are tied.

    The table is used as it lies: its transpose would be a copy of the largest matrix of a small model.
    """

    weight: Matrix  # as it is kept
    vocab_dim: int = field(metadata={"static": True})  # which dimension of the weight is V
    dtype: Any = field(metadata={"static": True})  # of the product
    softcap: float | None = field(default=None, metadata={"static": True})  # logits become c · tanh(logit / c)

    @property
    def vocab_size(self) -> int:
        return jax.tree.leaves(self.weight)[0].shape[self.vocab_dim]  # codes and scales alike

    def gathered(self) -> Head:
        """The same with its weight in place for logits of chunks of a batch, not once a chunk."""
        axes = ("vocab", "activation") if self.vocab_dim == 0 else ("activation", "vocab")
        return replace(self, weight=constrain(in_dtype(self.weight, self.dtype), *axes))

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """All logits at once, float32. For generation and tests; training never materialises them."""
        spec = "...d,vd->...v" if self.vocab_dim == 0 else "...d,dv->...v"
        weight = in_dtype(self.weight, self.dtype)
        return capped(jnp.einsum(spec, hidden, weight, preferred_element_type=jnp.float32), self.softcap)


def capped(logits: Array, softcap: float | None) -> Array:
    """Soft cap of logits (Gemma Team 2024): ``c · tanh(logit / c)``."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)
