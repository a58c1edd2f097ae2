"""The mixture of experts of Gemma 4, beside an MLP: router and experts read hidden states through their own norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from sft_jax.models.architecture import Norm
from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, broadcast_like, make_norm
from sft_jax.models.moe.experts import Experts, ExpertsSpec
from sft_jax.models.moe.router import Router, RouterSpec
from sft_jax.typing import Array, Float, Int


@dataclass(frozen=True)
class BesideMLPSpec:
    """``Σ weight · expert(norm(x))``, where the router reads a scaled norm of x without a weight.

    Attributes:
        norm: of the inputs of experts.
        norm_name: its module name in the layer.
    """

    router: RouterSpec
    experts: ExpertsSpec
    norm: Norm
    norm_name: str

    is_mixer: ClassVar[bool] = False

    def module(self, dim: int, make: Initializer, stack: tuple[int, ...]) -> BesideMLP:
        return BesideMLP(self, dim, make, stack)


class BesideMLP(nnx.Module):
    """The module of :class:`BesideMLPSpec`."""

    def __init__(self, spec: BesideMLPSpec, dim: int, make: Initializer, stack: tuple[int, ...]):
        self.spec = spec
        self.router = ScaledRouter(spec.router, Norm(spec.norm.eps, has_weight=False), dim, make, stack)
        self.experts = Experts(spec.experts, spec.router, dim, make, stack)
        setattr(self, spec.norm_name, make_norm(dim, spec.norm, make, stack))

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        weights, chosen = self.router(x.reshape(-1, x.shape[-1]), context)
        weights, chosen = (one.reshape(*x.shape[:2], -1) for one in (weights, chosen))
        return self.experts(getattr(self, self.spec.norm_name)(x), chosen, weights, context)


class ScaledRouter(nnx.Module):
    """A router that reads normalized hidden states times a vector, and multiplies each expert's weight by a scalar."""

    def __init__(self, spec: RouterSpec, norm: Norm, dim: int, make: Initializer, stack: tuple[int, ...]):
        self.norm = make_norm(dim, norm, make, stack)
        self.proj = Router(spec, dim, make, stack)
        self.scale = make.constant(1.0, (*stack, dim), ("norm",))
        self.per_expert_scale = make.constant(1.0, (*stack, spec.num_experts), ("norm",))

    def __call__(self, tokens: Float[Array, "n D"], context: Context) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
        tokens = self.norm(tokens)
        tokens = tokens * broadcast_like(self.scale[...], tokens) * jnp.asarray(tokens.shape[-1] ** -0.5, tokens.dtype)
        weights, chosen = self.proj(tokens, context)
        return weights * self.per_expert_scale[...].astype(jnp.float32)[chosen], chosen
