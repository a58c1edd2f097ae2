"""The output projection, from hidden states to logits."""

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
    """The output projection: ``lm_head`` ``[D, V]``, or the embeddings ``[V, D]`` if the two are tied.

    Tied embeddings are not transposed: that would copy the largest matrix of a small model.
    """

    weight: Matrix  # as stored, maybe quantized
    vocab_dim: int = field(metadata={"static": True})  # the dimension of the weight that is V
    dtype: Any = field(metadata={"static": True})  # compute dtype
    softcap: float | None = field(default=None, metadata={"static": True})  # logits become c · tanh(logit / c)

    @property
    def vocab_size(self) -> int:
        return jax.tree.leaves(self.weight)[0].shape[self.vocab_dim]  # the same for codes and scales

    def gathered(self) -> Head:
        """Returns a copy with the weight gathered and dequantized once, instead of once per chunk of a batch."""
        axes = ("vocab", "activation") if self.vocab_dim == 0 else ("activation", "vocab")
        return replace(self, weight=constrain(in_dtype(self.weight, self.dtype), *axes))

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Computes all logits in float32. For generation and tests; training never materializes them."""
        spec = "...d,vd->...v" if self.vocab_dim == 0 else "...d,dv->...v"
        weight = in_dtype(self.weight, self.dtype)
        return capped(jnp.einsum(spec, hidden, weight, preferred_element_type=jnp.float32), self.softcap)


def capped(logits: Array, softcap: float | None) -> Array:
    """Applies the soft cap ``c · tanh(logit / c)`` (Gemma Team 2024); None for no cap."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)
