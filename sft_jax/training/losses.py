"""Losses as sums, not means.

A loss is a function from a batch to named sums. The step adds them over microbatches and devices and divides once, so
the result does not depend on how the batch is split. The code that adds and divides is independent of their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.models.decoder import Decoder
from sft_jax.training.cross_entropy import PLAIN, Terms, masked_cross_entropy
from sft_jax.typing import Array, Batch

Sums = dict[str, Array]  # float32, of any shape


@dataclass(frozen=True)
class Loss:
    """A loss function and its metrics.

    Attributes:
        sums: computes the sums of a batch, with a dropout key or None. ``loss`` is differentiated, and divided by
            ``weight``.
        zeros: the initial values of the sums.
        ratios: maps the name of a metric to the names of its numerator and denominator among the sums.
    """

    sums: Callable[[Decoder, Batch, Array | None], Sums]
    zeros: Mapping[str, np.ndarray]
    ratios: Mapping[str, tuple[str, str]]

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the metrics of some sums, traced or not; 0 where the denominator is 0."""
        return {
            name: _ratio(sums[numerator], sums[denominator]) for name, (numerator, denominator) in self.ratios.items()
        }


def _ratio(numerator: Any, denominator: Any) -> Any:
    where = jnp.where if isinstance(denominator, jax.Array) else np.where
    return numerator / where(denominator > 0, denominator, 1.0)


def batch_loss(
    model: Decoder,
    batch: Batch,
    dropout_key: Array | None = None,
    num_sources: int = 0,
    terms: Terms = PLAIN,
    router_aux_loss: float = 0.0,
) -> Sums:
    """Computes the next-token cross-entropy of supervised tokens, weighted by the loss mask.

    Args:
        num_sources: number of data sources in ``batch.sources``; 0 for no sums per source.
        terms: terms besides the negative log-likelihood.
        router_aux_loss: weight of the routers' load-balancing loss. It is computed over all tokens of the batch, and
            counts as if each supervised token had it.

    Returns:
        ``loss, weight``; ``router_aux_loss`` if it has a weight; ``targets, correct, entropy`` over supervised tokens,
        each counted once; and ``source_loss, source_weight`` ``[S]``.
    """
    inputs = (batch.inputs, batch.segment_ids, batch.positions, dropout_key)
    hidden, balance = model.with_balance(*inputs) if router_aux_loss else (model(*inputs), None)
    loss, tokens = masked_cross_entropy(hidden, model.head(), batch.targets, batch.loss_mask, terms)
    weights = batch.loss_mask.astype(jnp.float32)
    by_source = jnp.zeros((0, 2), jnp.float32)
    if num_sources:
        assert batch.sources is not None
        both = jnp.stack([tokens.loss, weights], axis=-1).reshape(-1, 2)
        by_source = jax.ops.segment_sum(both, batch.sources.reshape(-1), num_sources)
    weight = jnp.sum(weights)
    of_routers = {}
    if balance is not None:
        of_routers["router_aux_loss"] = balance * weight
        loss = loss + router_aux_loss * balance * weight
    return of_routers | {
        "loss": loss,
        "weight": weight,
        "targets": jnp.sum(weights != 0, dtype=jnp.float32),
        "correct": jnp.sum(tokens.correct, dtype=jnp.float32),
        "entropy": jnp.sum(tokens.entropy),
        "source_loss": by_source[:, 0],
        "source_weight": by_source[:, 1],
    }


def cross_entropy_loss(num_sources: int = 0, terms: Terms = PLAIN, router_aux_loss: float = 0.0) -> Loss:
    """Returns :func:`batch_loss` with its metrics."""
    zeros: dict[str, np.ndarray] = {}
    for names, shape in (("loss weight targets correct entropy", ()), ("source_loss source_weight", num_sources)):
        zeros |= {name: np.zeros(shape, np.float32) for name in names.split()}
    of_routers = ["router_aux_loss"] if router_aux_loss else []
    zeros |= {name: np.zeros((), np.float32) for name in of_routers}
    return Loss(
        lambda model, batch, key: batch_loss(model, batch, key, num_sources, terms, router_aux_loss),
        zeros,
        {name: (name, "weight") for name in of_routers}
        | {
            "loss": ("loss", "weight"),
            "token_accuracy": ("correct", "targets"),
            "entropy": ("entropy", "targets"),
            "source_loss": ("source_loss", "source_weight"),
        },
    )
