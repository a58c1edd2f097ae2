"""Masked next-token cross-entropy: sums, never means.

Sums of losses and of target weights are carried through microbatches and devices and divided once, by the step, so
that the result does not depend on how a batch was cut up.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from sft_jax.models.decoder import Decoder
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Batch, Float, Int

CHUNK_SLOTS = 4096  # slots of a batch whose logits are held at a time


def masked_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    loss_mask: Float[Array, "B T"],
    chunk_slots: int = CHUNK_SLOTS,
) -> Float[Array, "B T"]:
    """``-loss_mask · log softmax(hidden · head)[target]`` of every position, float32; the mask may be bool.

    Projection and loss run together over chunks of positions and are recomputed in the backward pass: no more than
    ``chunk_slots × V`` logits exist at once. Masked positions contribute exactly zero, also to gradients, whatever
    their hidden state is.
    """
    num_rows, length, _ = hidden.shape
    chunk = min(length, max(1, chunk_slots // num_rows))
    padding = -length % chunk

    def split(x: Array) -> Array:  # [B, T, ...] -> [chunks, B, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(num_rows, -1, chunk, *x.shape[2:]), 1, 0)

    head = constrain(head, "activation", "vocab")  # gathered once, not once a chunk

    @jax.checkpoint
    def chunk_losses(_: None, scanned: tuple[Array, Array, Array]) -> tuple[None, Array]:
        hidden, targets, mask = scanned
        logits = jnp.einsum("bcd,dv->bcv", hidden, head, preferred_element_type=jnp.float32)
        logits = constrain(logits, "batch", "length", "vocab")
        nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return None, jnp.where(mask != 0, nll * mask, 0.0)

    mask = loss_mask.astype(jnp.float32)
    _, losses = lax.scan(chunk_losses, None, (split(hidden), split(targets), split(mask)))
    return jnp.moveaxis(losses, 0, 1).reshape(num_rows, -1)[:, :length]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossSums:
    """What is carried through microbatches and devices; float32.

    ``by_source`` has a row (loss, weight) for each source, none where they are not told apart.
    """

    weight: Float[Array, ""]
    by_source: Float[Array, "S 2"]


def batch_loss(
    model: Decoder, batch: Batch, dropout_key: Array | None = None, num_sources: int = 0
) -> tuple[Array, LossSums]:
    """Summed loss of a batch, to be differentiated, and the sums that go with it.

    Args:
        num_sources: how many ``batch.sources`` tells apart; 0 for not at all.
    """
    hidden = model(batch.inputs, batch.segment_ids, batch.positions, dropout_key)
    losses = masked_cross_entropy(hidden, model.head(), batch.targets, batch.loss_mask)
    weights = batch.loss_mask.astype(jnp.float32)
    by_source = jnp.zeros((0, 2), jnp.float32)
    if num_sources:
        assert batch.sources is not None
        both = jnp.stack([lax.stop_gradient(losses), weights], axis=-1).reshape(-1, 2)
        by_source = jax.ops.segment_sum(both, batch.sources.reshape(-1), num_sources)
    return jnp.sum(losses), LossSums(jnp.sum(weights), by_source)
