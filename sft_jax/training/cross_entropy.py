"""Masked cross-entropy fused with the output projection: loss, gradients and statistics in one pass.

Only supervised tokens are projected to logits. They are gathered into chunks, and the logits of a chunk give its loss,
gradients and statistics. Only one chunk of logits exists at a time, the backward pass recomputes nothing, and prompt
and padding cost nothing.

On a mesh, the vocabulary is sharded over all devices that hold different shards of the weights. ``lm_head`` is never
all-gathered: the hidden states of a chunk are, and each device sums the gradient of its own vocabulary shard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sft_jax.models.head import Head, capped
from sft_jax.models.quantized import Matrix, in_dtype
from sft_jax.models.symbolic import values_and_perturbed
from sft_jax.sharding import axis_names, current_mesh, partition_spec
from sft_jax.typing import Array, Bool, Float, Int

LOGIT_BYTES = 160 * 2**20  # float32 logits of a chunk per device
MAX_CHUNK = 512  # tokens per device
_MASKED = -1e30  # logit of the columns that pad the last vocabulary shard


class TokenLosses(NamedTuple):
    """Statistics of each token; zero where the mask is zero. No gradient flows through them."""

    loss: Float[Array, "B T"]  # weighted by the mask, with all terms
    correct: Bool[Array, "B T"]  # the target has the largest logit
    entropy: Float[Array, "B T"]  # of the predicted distribution, in nats


@dataclass(frozen=True)
class Terms:
    """Terms that are added to the negative log-likelihood of the target.

    ``label_smoothing`` ε mixes the target with the uniform distribution (Szegedy et al. 2016); ``z_loss`` ζ adds
    ``ζ · (log Σ exp logits)²``, which keeps logits from drifting (Chowdhery et al. 2022).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


PLAIN = Terms()


def masked_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    loss_mask: Float[Array, "B T"],
    terms: Terms = PLAIN,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], TokenLosses]:
    """Computes the sum of ``loss_mask · loss(head(hidden), target)`` in float32, and the statistics of each token.

    The gradients to ``hidden`` and, if differentiated, to the weight of the head equal those of the plain formula and
    are summed in float32. Masked tokens contribute exactly zero, whatever their hidden state. The mask may be bool.

    Args:
        chunk: number of tokens per device whose logits exist at a time; see :func:`chunk_size`.
    """

    # A closure, because the arguments of a differentiable function must be arrays.
    @jax.custom_vjp
    def fused(hidden: Array, weight: Matrix, targets: Array, mask: Array) -> tuple[Array, TokenLosses]:
        loss, tokens, _, _ = _over_devices((hidden, weight, targets, mask), head, terms, chunk, (False, False))
        return loss, tokens

    def forward(*primals: Any) -> tuple[tuple[Array, TokenLosses], Any]:
        values, perturbed = values_and_perturbed(primals)
        trained = any(jax.tree.leaves(perturbed[1]))
        loss, tokens, *gradients = _over_devices(values, head, terms, chunk, (perturbed[0], trained))
        return (loss, tokens), gradients

    def backward(gradients: Any, cotangents: Any) -> tuple[Array | None, Array | None, None, None]:
        dtypes = (hidden.dtype, jax.tree.leaves(head.weight)[0].dtype)
        d_hidden, d_weight = (
            None if gradient is None else (gradient.astype(jnp.float32) * cotangents[0]).astype(dtype)
            for gradient, dtype in zip(gradients, dtypes, strict=True)
        )
        return d_hidden, d_weight, None, None

    fused.defvjp(forward, backward, symbolic_zeros=True)
    return fused(hidden, head.weight, targets, loss_mask.astype(jnp.float32))


def chunk_size(num_positions: int, logits_per_position: int, gradient_bytes: int = 0) -> int:
    """Returns the tokens per chunk and device: a power of two within ``LOGIT_BYTES``, at most a fifth of all tokens.

    The last chunk is half empty on average, so large chunks waste compute. Each chunk reads the whole weight, so small
    chunks waste bandwidth.

    Args:
        gradient_bytes: size of the head's gradient on this device, which each chunk reads and writes; 0 if the head is
            not trained. Logits may take a quarter of it.
    """
    logit_bytes = max(LOGIT_BYTES, gradient_bytes // 4)
    largest = max(1, min(MAX_CHUNK, num_positions // 5, logit_bytes // (4 * logits_per_position)))
    return 2 ** int(math.log2(largest))


def _over_devices(arrays: tuple[Any, ...], head: Head, terms: Terms, chunk: int | None, needs_grad: tuple[bool, bool]):
    """Applies :func:`_on_device` to the whole batch, or to each device's shard of batch and vocabulary."""
    hidden, weight, targets, mask = arrays
    if isinstance(weight, jax.Array):
        weight = weight.astype(head.dtype)  # before resharding
    mesh = current_mesh()
    if mesh is None:
        return _on_device((hidden, weight, targets, mask), head, terms, chunk, needs_grad, _Axes())

    # Reshard the weight from the model dimension to the vocabulary; this exchanges as much as a device holds.
    vocab = axis_names("head_vocab", mesh)
    missing = -head.vocab_size % math.prod(mesh.shape[name] for name in vocab)
    padding = [(0, missing if dim == head.vocab_dim else 0) for dim in range(2)]
    weight = jax.tree.map(lambda x: jnp.pad(x, padding), weight)
    token_spec = partition_spec(("batch", "length"), targets.shape, mesh)
    tokens = tuple(name for names in token_spec if names for name in ((names,) if isinstance(names, str) else names))
    axes = _Axes(
        vocab=vocab,
        tokens=tokens,
        gathered=tuple(name for name in tokens if name in vocab),
        all=tuple(mesh.axis_names),
        has_padding=missing > 0,
    )
    weight_spec = PartitionSpec(*(vocab or None if dim == head.vocab_dim else None for dim in range(2)))
    hidden_spec = PartitionSpec(*token_spec, None)

    def part(*local: Any):
        return _on_device(local, head, terms, chunk, needs_grad, axes)

    loss, statistics, d_hidden, d_weight = jax.shard_map(
        part,
        in_specs=(hidden_spec, weight_spec, token_spec, token_spec),
        out_specs=(
            PartitionSpec(),
            token_spec,
            hidden_spec if needs_grad[0] else None,
            weight_spec if needs_grad[1] else None,
        ),
        check_vma=False,  # trip counts and chunk sizes are equal on all devices of a collective
    )(hidden, weight, targets, mask)
    if missing and d_weight is not None:
        d_weight = lax.slice_in_dim(d_weight, 0, head.vocab_size, axis=head.vocab_dim)
    return loss, statistics, d_hidden, d_weight


@dataclass(frozen=True)
class _Axes:
    """Mesh axes by the dimension that they shard; empty on one device."""

    vocab: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()  # batch and length
    gathered: tuple[str, ...] = ()  # shard both tokens and vocabulary, so tokens are all-gathered over them
    all: tuple[str, ...] = ()
    has_padding: bool = False  # the vocabulary does not divide, and the last columns are padding


def _on_device(
    arrays: tuple[Any, ...], head: Head, terms: Terms, chunk: int | None, needs_grad: tuple[bool, bool], axes: _Axes
) -> tuple[Array, TokenLosses, Array | None, Array | None]:
    """Computes the loss of a device's tokens on its vocabulary shard; the number of chunks depends on the mask."""
    hidden, weight, targets, mask = arrays
    weight = in_dtype(weight, head.dtype)
    dim, local_vocab = hidden.shape[-1], weight.shape[head.vocab_dim]
    columns = jnp.arange(local_vocab)[None]
    if axes.vocab:
        columns += lax.axis_index(axes.vocab) * local_vocab
    flat, flat_targets, flat_mask = hidden.reshape(-1, dim), targets.reshape(-1), mask.reshape(-1)
    size = flat.shape[0]
    gradient_bytes = 4 * weight.size if needs_grad[1] else 0
    chunk = chunk or chunk_size(size, local_vocab * lax.axis_size(axes.gathered), gradient_bytes)
    order = jnp.nonzero(flat_mask, size=size + -size % chunk, fill_value=size)[0]  # supervised tokens first
    num_chunks = (jnp.count_nonzero(flat_mask) + chunk - 1) // chunk
    if axes.all:
        num_chunks = lax.pmax(num_chunks, axes.all)  # every chunk has collectives
    vocab_first = head.vocab_dim == 0
    project = "cd,vd->cv" if vocab_first else "cd,dv->cv"
    back = "cv,vd->cd" if vocab_first else "cv,dv->cd"
    outer = "cv,cd->vd" if vocab_first else "cd,cv->dv"

    def one_chunk(i: Array, carry: Any) -> Any:
        statistics, d_hidden, d_weight = carry
        at = lax.dynamic_slice(order, (i * chunk,), (chunk,))
        x, target, token_weight = (a.at[at].get(mode="fill", fill_value=0) for a in (flat, flat_targets, flat_mask))
        if axes.gathered:
            x, target, token_weight = (lax.all_gather(a, axes.gathered, tiled=True) for a in (x, target, token_weight))
        logits = capped(jnp.einsum(project, x, weight, preferred_element_type=jnp.float32), head.softcap)
        chunk_statistics, gradient = _of_logits(logits, columns, target, token_weight, head, terms, axes)
        if axes.gathered:
            chunk_statistics = lax.dynamic_slice_in_dim(chunk_statistics, lax.axis_index(axes.gathered) * chunk, chunk)
        statistics = statistics.at[at].set(chunk_statistics, mode="drop")
        gradient = gradient.astype(weight.dtype)
        if d_hidden is not None:
            dx = jnp.einsum(back, gradient, weight, preferred_element_type=jnp.float32)
            if axes.gathered:
                dx = lax.psum_scatter(dx, axes.gathered, tiled=True)
            rest = tuple(name for name in axes.vocab if name not in axes.gathered)
            dx = lax.psum(dx, rest) if rest else dx
            d_hidden = d_hidden.at[at].set(dx.astype(d_hidden.dtype), mode="drop")
        if d_weight is not None:
            operands = (gradient, x) if vocab_first else (x, gradient)
            d_weight += jnp.einsum(outer, *operands, preferred_element_type=jnp.float32)
        return statistics, d_hidden, d_weight

    start = (
        jnp.zeros((size, 3), jnp.float32),
        jnp.zeros_like(flat) if needs_grad[0] else None,
        jnp.zeros(weight.shape, jnp.float32) if needs_grad[1] else None,
    )
    statistics, d_hidden, d_weight = lax.fori_loop(0, num_chunks, one_chunk, start)
    losses, correct, entropy = (x.reshape(mask.shape) for x in jnp.moveaxis(statistics, -1, 0))
    total = jnp.sum(losses)
    if axes.tokens:
        total = lax.psum(total, axes.tokens)
    alone = tuple(name for name in axes.tokens if name not in axes.gathered)
    if d_weight is not None and alone:
        d_weight = lax.psum(d_weight, alone)
    if d_hidden is not None:
        d_hidden = d_hidden.reshape(hidden.shape)
    return total, TokenLosses(losses, correct > 0, entropy), d_hidden, d_weight


def _of_logits(
    logits: Float[Array, "c v"],
    columns: Int[Array, "1 v"],
    target: Int[Array, "c"],
    token_weight: Float[Array, "c"],
    head: Head,
    terms: Terms,
    axes: _Axes,
) -> tuple[Float[Array, "c 3"], Float[Array, "c v"]]:
    """Returns weighted loss, correctness and entropy of each token, and the gradient to the logits before the cap."""

    def over_vocab(x: Array) -> Array:
        return lax.psum(x, axes.vocab) if axes.vocab else x

    exists = columns < head.vocab_size
    if axes.has_padding:
        logits = jnp.where(exists, logits, _MASKED)
    hit = columns == target[:, None]
    top = jnp.max(logits, axis=-1)
    top = lax.pmax(top, axes.vocab) if axes.vocab else top
    exps = jnp.exp(logits - top[:, None])
    sums = jnp.stack([jnp.sum(exps, -1), jnp.sum(jnp.where(hit, logits, 0.0), -1), jnp.sum(exps * logits, -1)])
    total, target_logit, expected = over_vocab(sums)
    log_total = top + jnp.log(total)
    loss = log_total - target_logit
    slope = 1.0 / total  # derivative of the loss by exps
    if terms.label_smoothing:
        mean = over_vocab(jnp.sum(jnp.where(exists, logits, 0.0), -1)) / head.vocab_size
        loss += terms.label_smoothing * (target_logit - mean)
    if terms.z_loss:
        loss += terms.z_loss * log_total**2
        slope *= 1.0 + 2.0 * terms.z_loss * log_total
    right = (target_logit >= top).astype(jnp.float32)
    statistics = jnp.stack([loss * token_weight, right, log_total - expected / total], axis=-1)

    gradient = exps * slope[:, None] - jnp.where(hit, 1.0 - terms.label_smoothing, 0.0)
    if terms.label_smoothing:
        gradient -= terms.label_smoothing / head.vocab_size
    if head.softcap is not None:
        gradient *= 1.0 - (logits / head.softcap) ** 2
    if axes.has_padding:
        gradient = jnp.where(exists, gradient, 0.0)
    return statistics, gradient * token_weight[:, None]
