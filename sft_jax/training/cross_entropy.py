"""Masked cross-entropy fused with the output projection: loss, gradients and statistics in one pass.

Only positions that carry loss meet the projection. They are gathered into chunks; the logits of a chunk give its loss,
its gradients and what is reported about it, and are forgotten. No more than a chunk of logits exists at a time, nothing
is recomputed in the backward pass, and prompt and padding cost nothing.

On a mesh the vocabulary is split over all devices that hold different parts of the weights, and the head is never
gathered: the hidden states of a chunk travel instead, and each device adds up the gradient of its own columns.
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
from sft_jax.sharding import axis_names, current_mesh, partition_spec
from sft_jax.typing import Array, Bool, Float, Int

LOGIT_BYTES = 160 * 2**20  # of a chunk on one device, float32
MAX_CHUNK = 512  # positions of one device
_NEVER = -1e30  # the logit of a column that only fills up the last shard


class TokenLosses(NamedTuple):
    """What was found at each position; zero where the mask is. No gradient flows through it."""

    loss: Float[Array, "B T"]  # weighted, all terms
    correct: Bool[Array, "B T"]  # no other token was likelier
    entropy: Float[Array, "B T"]  # of the predicted distribution, in nats


@dataclass(frozen=True)
class Terms:
    """What is added to the negative log-likelihood of a target.

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
    """Sum of ``loss_mask · loss(head(hidden), target)``, float32, and what was found at each position.

    Gradients are those of the plain formula: to ``hidden``, and to the head's weight if that is differentiated, added
    up in float32. Masked positions contribute exactly zero, whatever their hidden state is. The mask may be bool.

    Args:
        chunk: positions of a device whose logits exist at a time; see :func:`chunk_size`.
    """

    # A closure: what is not an array has no place among the arguments of a differentiable function.
    @jax.custom_vjp
    def fused(hidden: Array, weight: Matrix, targets: Array, mask: Array) -> tuple[Array, TokenLosses]:
        loss, tokens, _, _ = _over_devices((hidden, weight, targets, mask), head, terms, chunk, (False, False))
        return loss, tokens

    def forward(*primals: Any) -> tuple[tuple[Array, TokenLosses], Any]:
        is_primal = lambda node: hasattr(node, "perturbed")  # noqa: E731
        values = jax.tree.map(lambda leaf: leaf.value, primals, is_leaf=is_primal)
        trained = any(leaf.perturbed for leaf in jax.tree.leaves(primals[1], is_leaf=is_primal))
        loss, tokens, *gradients = _over_devices(values, head, terms, chunk, (primals[0].perturbed, trained))
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
    """Positions of a device in a chunk: a power of two, as many as ``LOGIT_BYTES`` allow and a fifth at most.

    The last chunk is half empty on average, and each reads the whole head: few are waste, and so are many.

    Args:
        gradient_bytes: of the head on this device, which each chunk reads and writes; 0 where the head is not trained.
            Beside it, logits of a quarter of its size are little.
    """
    logit_bytes = max(LOGIT_BYTES, gradient_bytes // 4)
    fitting = max(1, min(MAX_CHUNK, num_positions // 5, logit_bytes // (4 * logits_per_position)))
    return 2 ** int(math.log2(fitting))


def _over_devices(arrays: tuple[Any, ...], head: Head, terms: Terms, chunk: int | None, wanted: tuple[bool, bool]):
    """:func:`_on_device` on the whole batch, or on each device's part of batch and vocabulary."""
    hidden, weight, targets, mask = arrays
    if isinstance(weight, jax.Array):
        weight = weight.astype(head.dtype)  # before it travels
    mesh = current_mesh()
    if mesh is None:
        return _on_device((hidden, weight, targets, mask), head, terms, chunk, wanted, _Axes())

    # The model dimension is whole here: the weight is resharded, by an exchange of as much as a device holds.
    vocab = axis_names("head_vocab", mesh)
    missing = -head.vocab_size % math.prod(mesh.shape[name] for name in vocab)
    padding = [(0, missing if dim == head.vocab_dim else 0) for dim in range(2)]
    weight = jax.tree.map(lambda x: jnp.pad(x, padding), weight)
    rows = partition_spec(("batch", "length"), targets.shape, mesh)
    tokens = tuple(name for names in rows if names for name in ((names,) if isinstance(names, str) else names))
    axes = _Axes(
        vocab=vocab,
        tokens=tokens,
        gathered=tuple(name for name in tokens if name in vocab),
        all=tuple(mesh.axis_names),
        fills_up=missing > 0,
    )
    of_weight = PartitionSpec(*(vocab or None if dim == head.vocab_dim else None for dim in range(2)))
    of_hidden = PartitionSpec(*rows, None)

    def part(*local: Any):
        return _on_device(local, head, terms, chunk, wanted, axes)

    loss, found, d_hidden, d_weight = jax.shard_map(
        part,
        in_specs=(of_hidden, of_weight, rows, rows),
        out_specs=(PartitionSpec(), rows, of_hidden if wanted[0] else None, of_weight if wanted[1] else None),
        check_vma=False,  # trip counts and chunks are the same on all devices that meet in them
    )(hidden, weight, targets, mask)
    if missing and d_weight is not None:
        d_weight = lax.slice_in_dim(d_weight, 0, head.vocab_size, axis=head.vocab_dim)
    return loss, found, d_hidden, d_weight


@dataclass(frozen=True)
class _Axes:
    """Mesh axes by what they split; none on one device."""

    vocab: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()  # rows, and the slots of a row
    gathered: tuple[str, ...] = ()  # split tokens and vocabulary: each device needs the tokens of the others
    all: tuple[str, ...] = ()
    fills_up: bool = False  # the vocabulary does not divide; the last columns are none


def _on_device(
    arrays: tuple[Any, ...], head: Head, terms: Terms, chunk: int | None, wanted: tuple[bool, bool], axes: _Axes
) -> tuple[Array, TokenLosses, Array | None, Array | None]:
    """A device's tokens against its columns of the head, in as many chunks as there are targets for."""
    hidden, weight, targets, mask = arrays
    weight = in_dtype(weight, head.dtype)
    dim, local_vocab = hidden.shape[-1], weight.shape[head.vocab_dim]
    columns = jnp.arange(local_vocab)[None]
    if axes.vocab:
        columns += lax.axis_index(axes.vocab) * local_vocab
    flat, flat_targets, flat_mask = hidden.reshape(-1, dim), targets.reshape(-1), mask.reshape(-1)
    size = flat.shape[0]
    gradient_bytes = 4 * weight.size if wanted[1] else 0
    chunk = chunk or chunk_size(size, local_vocab * lax.axis_size(axes.gathered), gradient_bytes)
    order = jnp.nonzero(flat_mask, size=size + -size % chunk, fill_value=size)[0]  # targets first
    num_chunks = (jnp.count_nonzero(flat_mask) + chunk - 1) // chunk
    if axes.all:
        num_chunks = lax.pmax(num_chunks, axes.all)  # devices meet in each chunk
    is_table = head.vocab_dim == 0
    project = "cd,vd->cv" if is_table else "cd,dv->cv"
    back = "cv,vd->cd" if is_table else "cv,dv->cd"
    outer = "cv,cd->vd" if is_table else "cd,cv->dv"

    def one_chunk(i: Array, carry: Any) -> Any:
        found, d_hidden, d_weight = carry
        at = lax.dynamic_slice(order, (i * chunk,), (chunk,))
        x, target, weighs = (a.at[at].get(mode="fill", fill_value=0) for a in (flat, flat_targets, flat_mask))
        if axes.gathered:
            x, target, weighs = (lax.all_gather(a, axes.gathered, tiled=True) for a in (x, target, weighs))
        logits = capped(jnp.einsum(project, x, weight, preferred_element_type=jnp.float32), head.softcap)
        statistics, gradient = _of_logits(logits, columns, target, weighs, head, terms, axes)
        if axes.gathered:
            statistics = lax.dynamic_slice_in_dim(statistics, lax.axis_index(axes.gathered) * chunk, chunk)
        found = found.at[at].set(statistics, mode="drop")
        gradient = gradient.astype(weight.dtype)
        if d_hidden is not None:
            dx = jnp.einsum(back, gradient, weight, preferred_element_type=jnp.float32)
            if axes.gathered:
                dx = lax.psum_scatter(dx, axes.gathered, tiled=True)
            rest = tuple(name for name in axes.vocab if name not in axes.gathered)
            dx = lax.psum(dx, rest) if rest else dx
            d_hidden = d_hidden.at[at].set(dx.astype(d_hidden.dtype), mode="drop")
        if d_weight is not None:
            operands = (gradient, x) if is_table else (x, gradient)
            d_weight += jnp.einsum(outer, *operands, preferred_element_type=jnp.float32)
        return found, d_hidden, d_weight

    start = (
        jnp.zeros((size, 3), jnp.float32),
        jnp.zeros_like(flat) if wanted[0] else None,
        jnp.zeros(weight.shape, jnp.float32) if wanted[1] else None,
    )
    found, d_hidden, d_weight = lax.fori_loop(0, num_chunks, one_chunk, start)
    losses, correct, entropy = (x.reshape(mask.shape) for x in jnp.moveaxis(found, -1, 0))
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
    weighs: Float[Array, "c"],
    head: Head,
    terms: Terms,
    axes: _Axes,
) -> tuple[Float[Array, "c 3"], Float[Array, "c v"]]:
    """Weighted loss, whether right, and entropy of each position; and the loss's gradient to what made the logits."""

    def over_vocab(x: Array) -> Array:
        return lax.psum(x, axes.vocab) if axes.vocab else x

    exists = columns < head.vocab_size
    if axes.fills_up:
        logits = jnp.where(exists, logits, _NEVER)
    hit = columns == target[:, None]
    top = jnp.max(logits, axis=-1)
    top = lax.pmax(top, axes.vocab) if axes.vocab else top
    exps = jnp.exp(logits - top[:, None])
    sums = jnp.stack([jnp.sum(exps, -1), jnp.sum(jnp.where(hit, logits, 0.0), -1), jnp.sum(exps * logits, -1)])
    total, of_target, expected = over_vocab(sums)
    log_total = top + jnp.log(total)
    loss = log_total - of_target
    slope = 1.0 / total  # of the loss by exps
    if terms.label_smoothing:
        mean = over_vocab(jnp.sum(jnp.where(exists, logits, 0.0), -1)) / head.vocab_size
        loss += terms.label_smoothing * (of_target - mean)
    if terms.z_loss:
        loss += terms.z_loss * log_total**2
        slope *= 1.0 + 2.0 * terms.z_loss * log_total
    right = (of_target >= top).astype(jnp.float32)
    statistics = jnp.stack([loss * weighs, right, log_total - expected / total], axis=-1)

    gradient = exps * slope[:, None] - jnp.where(hit, 1.0 - terms.label_smoothing, 0.0)
    if terms.label_smoothing:
        gradient -= terms.label_smoothing / head.vocab_size
    if head.softcap is not None:
        gradient *= 1.0 - (logits / head.softcap) ** 2
    if axes.fills_up:
        gradient = jnp.where(exists, gradient, 0.0)
    return statistics, gradient * weighs[:, None]
