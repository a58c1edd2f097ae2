"""Computes per-token log-probabilities of given text, and the KL divergence between two models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sft_jax.data.batches.loader import local_sequences, make_batch, to_mesh
from sft_jax.data.batches.packing import plan_run
from sft_jax.data.tokens.examples import Examples
from sft_jax.distributed.processes import fetch
from sft_jax.models.compiler import compiler_options
from sft_jax.models.decoder import Decoder
from sft_jax.models.head import Head
from sft_jax.models.split import Split
from sft_jax.sharding import constrain
from sft_jax.training.cross_entropy import masked_cross_entropy
from sft_jax.tree import Params
from sft_jax.typing import Array, Batch

CHUNK_TOKENS = 2048  # tokens of a batch whose logits exist at a time, for each of two models


@dataclass(frozen=True)
class TokenScores:
    """Scores of all tokens but the first of each example, concatenated; example ``i`` has ``starts[i]:starts[i+1]``."""

    log_prob: np.ndarray  # float32
    correct: np.ndarray  # bool: the token was the most likely one
    starts: np.ndarray


class Scorer:
    """Scores examples with one network in packed sequences; compiles one program for all batches.

    Args:
        length: sequence length; no example may be longer.
        batch_size: sequences per batch.
    """

    def __init__(self, split: Split, length: int, batch_size: int):
        self._mesh, self._length, self._batch_size = split.mesh, length, batch_size
        options = compiler_options(split)
        self._score = jax.jit(
            lambda trainable, frozen, batch: _token_scores(split.merge(trainable, frozen), batch),
            compiler_options=options,
        )
        self._diverge = jax.jit(
            lambda base, tuned, frozen, batch: _divergence(
                split.merge(base, frozen), split.merge(tuned, frozen), batch
            ),
            compiler_options=options,
        )

    def score(
        self,
        trainable: Params,
        frozen: Params,
        examples: Examples,
        progress: Callable[[int], object] = lambda examples: None,
    ) -> TokenScores:
        """Computes the log-probability of each token given the previous tokens of its example."""
        log_prob, correct = self._over_batches(
            examples, lambda batch: self._score(trainable, frozen, batch), (np.float32, bool), progress
        )
        return TokenScores(log_prob, correct, _starts(examples))

    def divergence(self, base: Params, tuned: Params, frozen: Params, examples: Examples) -> float:
        """Computes the mean over tokens of KL(base ‖ tuned) of the next-token distributions, in nats."""
        (divergence,) = self._over_batches(
            examples, lambda batch: (self._diverge(base, tuned, frozen, batch),), (np.float32,)
        )
        return float(divergence.mean(dtype=np.float64))

    def _over_batches(
        self,
        examples: Examples,
        compute: Callable[[Batch], tuple[Array, ...]],
        dtypes: tuple[type, ...],
        progress: Callable[[int], object] = lambda examples: None,
    ) -> list[np.ndarray]:
        """Runs ``compute`` over all batches and returns its ``[B, T]`` results in the order of the examples."""
        plan = plan_run(examples.num_tokens, self._length, self._batch_size, 1, shuffle=False)
        mine = local_sequences(self._mesh, self._batch_size)
        starts = _starts(examples)
        flat = [np.zeros(int(starts[-1]), dtype) for dtype in dtypes]
        with jax.set_mesh(self._mesh):
            for step in range(plan.num_steps):
                rows = plan.rows_of(step)
                local = make_batch(examples, rows[mine], mine.stop - mine.start, self._length)
                computed = fetch(compute(to_mesh(local, self._mesh, self._batch_size, mine)))
                for r, items in enumerate(rows):
                    at = 0
                    for item in items:
                        size = int(examples.num_tokens[item])
                        for into, values in zip(flat, computed, strict=True):
                            into[starts[item] : starts[item + 1]] = values[r, at : at + size]
                        at += size
                progress(sum(map(len, rows)))
        return flat


def _starts(examples: Examples) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(examples.num_tokens)])


def _token_scores(model: Decoder, batch: Batch) -> tuple[Array, Array]:
    hidden = model(batch.inputs, batch.segment_ids, batch.positions)
    real = (batch.segment_ids > 0).astype(jnp.float32)
    _, tokens = masked_cross_entropy(hidden, model.head(), batch.targets, real)
    return -tokens.loss, tokens.correct


def _divergence(base: Decoder, tuned: Decoder, batch: Batch) -> Array:
    heads = [model.head().gathered() for model in (base, tuned)]

    def chunk(scanned: tuple[Array, ...]) -> Array:
        p, q = (_log_probs(hidden, head) for hidden, head in zip(scanned, heads, strict=True))
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    inputs = (batch.inputs, batch.segment_ids, batch.positions)
    return _in_chunks(chunk, base(*inputs), tuned(*inputs))


def _log_probs(hidden: Array, head: Head) -> Array:
    return jax.nn.log_softmax(constrain(head.logits(hidden), "batch", "length", "vocab"), axis=-1)


def _in_chunks(function: Callable, *arrays: Array):
    """Maps ``function`` over chunks of positions, so that only the logits of one chunk exist at a time.

    The positions of a chunk are strided over the sequence, so that each chunk is spread over the ``sequence`` mesh
    axis.
    """
    batch_size, length = arrays[0].shape[:2]
    size = min(length, max(1, CHUNK_TOKENS // batch_size))
    padding = -length % size

    def split(x: Array) -> Array:  # [B, T, ...] -> [chunks, B, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch_size, size, -1, *x.shape[2:]), 2, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 2).reshape(batch_size, length + padding)[:, :length]

    return jax.tree.map(join, lax.map(function, tuple(map(split, arrays))))
