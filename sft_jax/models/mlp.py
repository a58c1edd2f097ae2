"""The MLP, gated or plain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, Linear, linear
from sft_jax.models.remat import PRODUCT, checkpoint_name
from sft_jax.models.xielu import XIELU
from sft_jax.typing import Array, Float

# By their names in transformers.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.nn.relu(x) ** 2,
}


@dataclass(frozen=True)
class MLPSpec:
    """``down_proj(activation(gate_proj(x)) · up_proj(x))`` (Shazeer 2020), or ``down_proj(activation(up_proj(x)))``.

    Attributes:
        activation: in :data:`ACTIVATIONS`, or ``xielu``, which has parameters.
        gated: whether there is a ``gate_proj``.
        names: of ``up_proj`` and ``down_proj`` in a family that calls a plain MLP's layers otherwise.
        fused: the name of one layer for ``gate_proj`` and ``up_proj``, in this order; None for two.
    """

    intermediate_size: int
    activation: str = "silu"
    bias: bool = False
    gated: bool = True
    names: tuple[str, str] = ("up_proj", "down_proj")
    fused: str | None = None

    is_mixer: ClassVar[bool] = False

    def module(self, dim: int, make: Initializer, stack: tuple[int, ...]) -> MLP:
        return MLP(self, dim, make, stack)


class MLP(nnx.Module):
    """The module of :class:`MLPSpec`."""

    def __init__(self, spec: MLPSpec, dim: int, make: Initializer, stack: tuple[int, ...]):
        size = spec.intermediate_size
        self.spec = spec
        self.act_fn = nnx.data(XIELU(make, stack) if spec.activation == "xielu" else None)
        up, down = spec.names
        if spec.fused is not None:
            setattr(self, spec.fused, Linear(dim, 2 * size, ("embed", "mlp"), make, stack, spec.bias))
        else:
            if spec.gated:
                self.gate_proj = Linear(dim, size, ("embed", "mlp"), make, stack, spec.bias)
            setattr(self, up, Linear(dim, size, ("embed", "mlp"), make, stack, spec.bias))
        setattr(self, down, Linear(size, dim, ("mlp", "embed"), make, stack, spec.bias))

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        in_context, out_context = context.split(2)
        activation = self.act_fn or ACTIVATIONS[self.spec.activation]
        down_proj = getattr(self, self.spec.names[1])
        if self.spec.fused is not None:
            gate, up = jnp.split(checkpoint_name(getattr(self, self.spec.fused)(x, in_context), PRODUCT), 2, axis=-1)
            return down_proj(activation(gate) * up, out_context)
        up_proj = getattr(self, self.spec.names[0])
        if not self.spec.gated:
            return down_proj(activation(checkpoint_name(up_proj(x, in_context), PRODUCT)), out_context)
        gate, up = (checkpoint_name(one, PRODUCT) for one in linear(x, [self.gate_proj, up_proj], in_context))
        return down_proj(activation(gate) * up, out_context)
