"""The loss of a batch, as sums: never means.

Sums of losses and of target weights are carried through microbatches and devices and divided once, by the step, so
that the result does not depend on how a batch was cut up.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sft_jax.models.decoder import Decoder
from sft_jax.training.cross_entropy import PLAIN, Terms, masked_cross_entropy
from sft_jax.typing import Array, Batch, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossSums:
    """What is carried through microbatches and devices; float32.

    ``by_source`` has a row (loss, weight) for each source, none where they are not told apart.
    """

    weight: Float[Array, ""]
    targets: Float[Array, ""]  # positions that carry loss
    correct: Float[Array, ""]  # of these, where the target was the likeliest token
    entropy: Float[Array, ""]
    by_source: Float[Array, "S 2"]


def no_sums(num_sources: int) -> LossSums:
    """Where adding up starts."""
    nothing = jnp.zeros(())
    return LossSums(nothing, nothing, nothing, nothing, jnp.zeros((num_sources, 2)))


def batch_loss(
    model: Decoder, batch: Batch, dropout_key: Array | None = None, num_sources: int = 0, terms: Terms = PLAIN
) -> tuple[Array, LossSums]:
    """Summed loss of a batch, to be differentiated, and the sums that go with it.

    Args:
        num_sources: how many ``batch.sources`` tells apart; 0 for not at all.
        terms: what the loss has besides the negative log-likelihood.
    """
    hidden = model(batch.inputs, batch.segment_ids, batch.positions, dropout_key)
    loss, tokens = masked_cross_entropy(hidden, model.head(), batch.targets, batch.loss_mask, terms)
    weights = batch.loss_mask.astype(jnp.float32)
    by_source = jnp.zeros((0, 2), jnp.float32)
    if num_sources:
        assert batch.sources is not None
        both = jnp.stack([tokens.loss, weights], axis=-1).reshape(-1, 2)
        by_source = jax.ops.segment_sum(both, batch.sources.reshape(-1), num_sources)
    sums = LossSums(
        weight=jnp.sum(weights),
        targets=jnp.sum(weights != 0, dtype=jnp.float32),
        correct=jnp.sum(tokens.correct, dtype=jnp.float32),
        entropy=jnp.sum(tokens.entropy),
        by_source=by_source,
    )
    return loss, sums
