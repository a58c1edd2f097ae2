"""Routers: the experts that each token is sent to, and the weights of their outputs."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, Projection
from sft_jax.models.moe.balance import load_balance
from sft_jax.models.quantized import in_dtype
from sft_jax.typing import Array, Float, Int


@dataclass(frozen=True)
class RouterSpec:
    """How experts are chosen. A router sees each token by itself and drops none.

    Attributes:
        scores: of the logits of all experts: ``softmax``; ``sigmoid``; ``softmax_of_top``, over the logits of the
            chosen experts; ``sparsemixer`` (Liu et al. 2024), two experts whose scores are softmaxes over logits that
            are nearly as large.
        use_bias: whether the logits have a bias.
        correction: the name of a buffer that is added to the scores for the choice only (DeepSeek-V3); None for none.
        correction_dims: 2 for a buffer ``[1, E]``.
        groups, top_groups: experts are in groups, and are chosen from those with the largest sums of two scores.
        normalize: whether the weights of a token are divided by their sum.
        eps: added to that sum.
        scale: multiplies the weights.
        jitter: the width that ``sparsemixer`` compares logits with.
    """

    num_experts: int
    num_experts_per_token: int
    scores: str = "softmax"
    use_bias: bool = False
    correction: str | None = None
    correction_dims: int = 1
    groups: int = 1
    top_groups: int = 1
    normalize: bool = True
    eps: float = 0.0
    scale: float = 1.0
    jitter: float = 0.01


class Router(Projection):
    """The module of :class:`RouterSpec`: a linear layer, never quantized, computed in float32."""

    can_be_quantized = False

    def __init__(self, spec: RouterSpec, dim: int, make: Initializer, stack: tuple[int, ...]):
        super().__init__(dim, spec.num_experts, ("embed", "router"), make, stack)
        self.spec = spec
        shape = (*stack, spec.num_experts)
        self.bias: nnx.Param | None = nnx.data(make.constant(0.0, shape, ("norm",)) if spec.use_bias else None)
        if spec.correction is not None:
            shape = (*stack, *[1] * (spec.correction_dims - 1), spec.num_experts)
            setattr(self, spec.correction, make.buffer(0.0, shape, ("norm",) * spec.correction_dims))

    def __call__(self, tokens: Float[Array, "n D"], context: Context) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
        """Returns the weights and the indices of the experts of each token."""
        logits = self._logits(tokens, context)
        weights, chosen = self._choose(logits)
        if context.balances is not None:
            assert context.segment_ids is not None
            context.balances.append(load_balance(self._shares(logits), chosen, context.segment_ids.reshape(-1) > 0))
        return weights, chosen

    def _logits(self, tokens: Float[Array, "n D"], context: Context) -> Float[Array, "n E"]:
        """Returns the logits of all experts in float32."""
        weight = in_dtype(self.matrix(context), tokens.dtype)
        logits = jnp.dot(tokens, weight, preferred_element_type=jnp.float32)
        return logits if self.bias is None else logits + self.bias[...].astype(jnp.float32)

    def _shares(self, logits: Float[Array, "n E"]) -> Float[Array, "n E"]:
        """Returns the scores of all experts, which sum to 1."""
        if self.spec.scores != "sigmoid":
            return jax.nn.softmax(logits)
        scores = jax.nn.sigmoid(logits)
        return scores / jnp.sum(scores, axis=-1, keepdims=True)

    def _choose(self, logits: Float[Array, "n E"]) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
        spec = self.spec
        if spec.scores == "sparsemixer":
            return _sparsemixer(logits, spec.jitter)
        if spec.scores == "softmax_of_top":
            top, chosen = lax.top_k(logits, spec.num_experts_per_token)
            return jax.nn.softmax(top, axis=-1), chosen
        scores = (jax.nn.sigmoid if spec.scores == "sigmoid" else jax.nn.softmax)(logits)
        ranked = scores if spec.correction is None else scores + getattr(self, spec.correction)[...]
        if spec.groups > 1:
            ranked = _in_top_groups(ranked, spec.groups, spec.top_groups)
        _, chosen = lax.top_k(lax.stop_gradient(ranked), spec.num_experts_per_token)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if spec.normalize:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + spec.eps)
        return weights * spec.scale, chosen


def _in_top_groups(scores: Float[Array, "n E"], groups: int, top_groups: int) -> Float[Array, "n E"]:
    """Returns the scores, and -∞ outside of the groups with the largest sums of two scores."""
    grouped = scores.reshape(scores.shape[0], groups, -1)
    best = jnp.sum(lax.top_k(grouped, 2)[0], axis=-1)
    _, chosen = lax.top_k(best, top_groups)
    is_chosen = jnp.any(chosen[:, :, None] == jnp.arange(groups, dtype=chosen.dtype), axis=1)
    return jnp.where(is_chosen[..., None], grouped, -jnp.inf).reshape(scores.shape)


def _sparsemixer(logits: Float[Array, "n E"], jitter: float) -> tuple[Float[Array, "n 2"], Int[Array, "n 2"]]:
    """Returns the largest logit's share of those near it, and the same for the second largest without the largest.

    As in inference; the sampling that pretraining used is left out.
    """
    weights, chosen, rest = [], [], logits
    for _ in range(2):
        largest = jnp.max(rest, axis=-1, keepdims=True)
        first = jnp.argmax(rest, axis=-1, keepdims=True)
        is_far = (largest - logits) / jnp.maximum(jnp.abs(logits), largest) > 2 * jitter
        shares = jax.nn.softmax(jnp.where(lax.stop_gradient(is_far), -jnp.inf, rest), axis=-1)
        weights.append(jnp.take_along_axis(shares, first, axis=-1))
        chosen.append(first)
        rest = jnp.where(jnp.arange(logits.shape[-1]) == first, -jnp.inf, rest)
    return jnp.concatenate(weights, axis=-1), jnp.concatenate(chosen, axis=-1)
