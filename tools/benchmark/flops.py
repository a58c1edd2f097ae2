"""Model FLOPs: what a step has to compute, whatever it does compute."""

from __future__ import annotations

from dataclasses import dataclass

from sft_jax.architecture import Architecture


@dataclass(frozen=True)
class Work:
    """What a step, or a second of steps, trains on."""

    tokens: float  # real ones, without padding
    targets: float  # of these, with loss
    squares: float  # sum over documents of their squared lengths


def model_flops(arch: Architecture, work: Work, rank: int | None) -> float:
    """Floating-point operations of forward and backward pass; a multiplication and an addition are two.

    A weight costs 2 a token forward, 2 for the gradient to its input and, if it is trained, 2 for its own: 4 a token
    where it is frozen, 6 where it is trained. The output head sees target tokens only. Attention is causal and stays
    within documents: two products of ``len² / 2`` scores forward and four backward, ``6 · len² · N · H`` a layer.
    Norms, rotations, softmax, the token table and whatever is computed twice count as nothing.

    Args:
        rank: of adapters on every linear layer, beside a frozen base; None for full fine-tuning.

    >>> one = Architecture("llama", 100, 8, 16, 1, 2, 1, 4, 1e-5, None, True)
    >>> model_flops(one, Work(tokens=10, targets=0, squares=0), None)  # 6 · 10 · (8·8 + 2·8·4 + 8·8 + 3·8·16)
    34560.0
    """
    d, f = arch.hidden_size, arch.intermediate_size
    q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    kernels = [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]
    weights = arch.num_layers * sum(rows * columns for rows, columns in kernels)
    head = arch.vocab_size * d
    attention = 6.0 * work.squares * q * arch.num_layers
    if rank is None:
        return 6.0 * (weights * work.tokens + head * work.targets) + attention
    adapters = arch.num_layers * rank * sum(rows + columns for rows, columns in kernels)
    return (4.0 * weights + 6.0 * adapters) * work.tokens + 4.0 * head * work.targets + attention
