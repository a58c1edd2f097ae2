"""Masked next-token cross-entropy: sums, never means.

Sums of losses and of target weights are carried through microbatches and devices and divided once, by the step, so
that the result does not depend on how a batch was cut up.
"""

from __future__ import annotations

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
) -> Float[Array, ""]:
    """Sum over targets of ``-loss_mask · log softmax(hidden · head)[target]``, float32; the mask may be bool.

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
    def chunk_loss(total: Array, scanned: tuple[Array, Array, Array]) -> tuple[Array, None]:
        hidden, targets, mask = scanned
        logits = jnp.einsum("bcd,dv->bcv", hidden, head, preferred_element_type=jnp.float32)
        logits = constrain(logits, "batch", "length", "vocab")
        nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return total + jnp.sum(jnp.where(mask != 0, nll * mask, 0.0)), None

    mask = loss_mask.astype(jnp.float32)
    total, _ = lax.scan(chunk_loss, jnp.zeros((), jnp.float32), (split(hidden), split(targets), split(mask)))
    return total


def batch_loss(model: Decoder, batch: Batch, dropout_key: Array | None = None) -> tuple[Array, Array]:
    """Summed loss and summed weights of the targets of a batch, both float32 scalars."""
    hidden = model(batch.inputs, batch.segment_ids, batch.positions, dropout_key)
    loss = masked_cross_entropy(hidden, model.head(), batch.targets, batch.loss_mask)
    return loss, jnp.sum(batch.loss_mask, dtype=jnp.float32)
