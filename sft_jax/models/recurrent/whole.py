"""Where a recurrence is computed: each device has whole sequences, and some of the heads."""

from __future__ import annotations

from sft_jax.models.context import Context
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float


def whole_sequences(x: Float[Array, "B T ..."], context: Context, *axes: str) -> Float[Array, "B T ..."]:
    """Constrains the sharding of an array whose dimensions after the length have these logical axes."""
    return constrain(x, "batch" if context.cache is None else "replica", "unsplit_length", *axes)
