"""Mixture of experts: a router picks the top-k experts for each token; no token is dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, Projection
from sft_jax.models.mlp import ACTIVATIONS, MLPSpec
from sft_jax.models.quantized import in_dtype
from sft_jax.models.remat import PRODUCT, checkpoint_name
from sft_jax.typing import Array, Float, Int


@dataclass(frozen=True)
class ExpertsSpec:
    """``Σ weight · expert(x)`` over the top-k experts; their probabilities are normalized to sum to 1."""

    num_experts: int
    num_experts_per_token: int
    expert: MLPSpec

    is_mixer: ClassVar[bool] = False

    def module(self, dim: int, make: Initializer, stack: tuple[int, ...]) -> MixtureOfExperts:
        return MixtureOfExperts(self, dim, make, stack)


class MixtureOfExperts(nnx.Module):
    """The module of :class:`ExpertsSpec`."""

    def __init__(self, spec: ExpertsSpec, dim: int, make: Initializer, stack: tuple[int, ...]):
        self.spec = spec
        self.gate = Projection(dim, spec.num_experts, ("embed", "experts"), make, stack)
        self.gate.can_be_quantized = False
        self.experts = _Experts(spec, dim, make, stack)

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        tokens = x.reshape(-1, x.shape[-1])
        router = in_dtype(self.gate.matrix(context), tokens.dtype)
        probabilities = jax.nn.softmax(jnp.dot(tokens, router, preferred_element_type=jnp.float32), axis=-1)
        weights, chosen = lax.top_k(probabilities, self.spec.num_experts_per_token)
        weights = (weights / jnp.sum(weights, axis=-1, keepdims=True)).astype(x.dtype)
        outs = self.experts(tokens, chosen, context)
        return jnp.einsum("nkd,nk->nd", outs, weights).reshape(x.shape)


class _Experts(nnx.Module):
    """Gated MLPs of equal shape, computed for groups of tokens with ``jax.lax.ragged_dot``."""

    def __init__(self, spec: ExpertsSpec, dim: int, make: Initializer, stack: tuple[int, ...]):
        self.spec = spec
        size, stack = spec.expert.intermediate_size, (*stack, spec.num_experts)
        self.gate_proj = Projection(dim, size, ("embed", "mlp"), make, stack)
        self.up_proj = Projection(dim, size, ("embed", "mlp"), make, stack)
        self.down_proj = Projection(size, dim, ("mlp", "embed"), make, stack)
        for one in (self.gate_proj, self.up_proj, self.down_proj):
            one.share = spec.num_experts_per_token / spec.num_experts

    def __call__(
        self, tokens: Float[Array, "n D"], chosen: Int[Array, "n k"], context: Context
    ) -> Float[Array, "n k D"]:
        """Returns the output of each chosen expert for each token.

        Tokens are sorted by expert: three tokens with the experts ``[0 2] [1 2] [0 1]`` become the groups
        ``0 2 │ 1 2 │ 0 1`` of experts 0, 1 and 2.
        """
        num, per_token = chosen.shape
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=self.spec.num_experts).astype(jnp.int32)
        x = tokens[order // per_token]
        gate, up, down = (
            in_dtype(one.matrix(context), x.dtype) for one in (self.gate_proj, self.up_proj, self.down_proj)
        )
        gate_out, up_out = (checkpoint_name(lax.ragged_dot(x, weight, sizes), PRODUCT) for weight in (gate, up))
        outs = lax.ragged_dot(ACTIVATIONS[self.spec.expert.activation](gate_out) * up_out, down, sizes)
        return jnp.zeros_like(outs).at[order].set(outs, unique_indices=True).reshape(num, per_token, -1)
