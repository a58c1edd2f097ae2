"""A mixture of experts: a router, experts, and experts that all tokens share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from flax import nnx

from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, Linear
from sft_jax.models.mlp import MLPSpec
from sft_jax.models.moe.experts import Experts, ExpertsSpec
from sft_jax.models.moe.router import Router, RouterSpec
from sft_jax.typing import Array, Float


@dataclass(frozen=True)
class Latent:
    """Linear layers before and after experts that have a dimension of their own."""

    dim: int
    before: str
    after: str
    bias: bool = False


@dataclass(frozen=True)
class MixtureSpec:
    """``Σ weight · expert(x)`` over the experts that a router chooses, plus shared experts.

    Attributes:
        router_name: the name of the router.
        shared: the MLP of all tokens; None for none.
        shared_name: its name.
        shared_gate: the name of a linear layer with one output whose sigmoid multiplies the shared MLP; None for none.
        latent: linear layers before and after the experts; None for none.
        scale_inputs: whether the router's weights multiply the inputs of experts, not their outputs (Llama 4).
    """

    router: RouterSpec
    experts: ExpertsSpec
    router_name: str = "gate"
    shared: MLPSpec | None = None
    shared_name: str = "shared_experts"
    shared_gate: str | None = None
    latent: Latent | None = None
    scale_inputs: bool = False

    is_mixer: ClassVar[bool] = False

    def module(self, dim: int, make: Initializer, stack: tuple[int, ...]) -> Mixture:
        return Mixture(self, dim, make, stack)


class Mixture(nnx.Module):
    """The module of :class:`MixtureSpec`."""

    def __init__(self, spec: MixtureSpec, dim: int, make: Initializer, stack: tuple[int, ...]):
        self.spec = spec
        setattr(self, spec.router_name, Router(spec.router, dim, make, stack))
        if (latent := spec.latent) is not None:
            setattr(self, latent.before, Linear(dim, latent.dim, ("embed", "mlp"), make, stack, latent.bias))
            setattr(self, latent.after, Linear(latent.dim, dim, ("mlp", "embed"), make, stack, latent.bias))
        expert_dim = dim if latent is None else latent.dim
        self.experts = Experts(spec.experts, spec.router, expert_dim, make, stack)
        if spec.shared is not None:
            setattr(self, spec.shared_name, spec.shared.module(dim, make, stack))
        if spec.shared_gate is not None:
            setattr(self, spec.shared_gate, Linear(dim, 1, ("embed", "router"), make, stack))

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        spec = self.spec
        shared_context, gate_context, before_context, after_context = context.split(4)
        router: Any = getattr(self, spec.router_name)
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = router(tokens, context)
        weights, chosen = (one.reshape(*x.shape[:2], -1) for one in (weights, chosen))
        inputs = x if spec.latent is None else getattr(self, spec.latent.before)(x, before_context)
        out = self.experts(inputs, chosen, weights, context, spec.scale_inputs)
        if spec.latent is not None:
            out = getattr(self, spec.latent.after)(out, after_context)
        if spec.shared is None:
            return out
        shared = getattr(self, spec.shared_name)(x, shared_context)
        if spec.shared_gate is not None:
            shared = shared * jax.nn.sigmoid(getattr(self, spec.shared_gate)(x, gate_context))
        return out + shared
