"""The load-balancing loss of a router."""

from __future__ import annotations

import jax.numpy as jnp

from sft_jax.typing import Array, Bool, Float, Int


def load_balance(
    shares: Float[Array, "n E"], chosen: Int[Array, "n k"], is_token: Bool[Array, "n"]
) -> Float[Array, ""]:
    """Returns ``E · Σ fraction of tokens sent to e · mean share of e`` (Fedus et al. 2021, equations 4 to 6).

    It is k if all experts get as many tokens, and more if they do not. The gradient flows through the shares.

    Args:
        shares: of each expert in the scores of a token; they sum to 1.
        is_token: false for padding, which counts nowhere.
    """
    num_experts = shares.shape[-1]
    weights = is_token.astype(jnp.float32)
    total = jnp.maximum(jnp.sum(weights), 1.0)
    is_sent = jnp.any(chosen[..., None] == jnp.arange(num_experts, dtype=chosen.dtype), axis=1)
    fraction = jnp.sum(jnp.where(is_sent, weights[:, None], 0.0), axis=0) / total
    share = jnp.sum(shares * weights[:, None], axis=0) / total
    return num_experts * jnp.sum(fraction * share)
