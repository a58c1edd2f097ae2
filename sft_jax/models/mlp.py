"""The gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
from flax import nnx

from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, Linear, linear
from sft_jax.models.remat import PRODUCT, checkpoint_name
from sft_jax.typing import Array, Float

# By their names in transformers.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


@dataclass(frozen=True)
class MLPSpec:
    """``down_proj(activation(gate_proj(x)) · up_proj(x))`` (Shazeer 2020); ``activation`` is in :data:`ACTIVATIONS`."""

    intermediate_size: int
    activation: str = "silu"
    bias: bool = False

    def module(self, dim: int, make: Initializer, stack: tuple[int, ...]) -> MLP:
        return MLP(self, dim, make, stack)


class MLP(nnx.Module):
    """The module of :class:`MLPSpec`."""

    def __init__(self, spec: MLPSpec, dim: int, make: Initializer, stack: tuple[int, ...]):
        size = spec.intermediate_size
        self.spec = spec
        self.gate_proj = Linear(dim, size, ("embed", "mlp"), make, stack, spec.bias)
        self.up_proj = Linear(dim, size, ("embed", "mlp"), make, stack, spec.bias)
        self.down_proj = Linear(size, dim, ("mlp", "embed"), make, stack, spec.bias)

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        in_context, out_context = context.split(2)
        gate, up = (checkpoint_name(one, PRODUCT) for one in linear(x, [self.gate_proj, self.up_proj], in_context))
        return self.down_proj(ACTIVATIONS[self.spec.activation](gate) * up, out_context)
