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
        names: of ``up_proj`` and ``down_proj`` in a family that calls them otherwise.
        gate_name: of ``gate_proj``, likewise.
        fused: the name of one layer for ``gate_proj`` and ``up_proj``, in this order; None for two.
        gate_scale: multiplies the output of ``gate_proj``.
    """

    intermediate_size: int
    activation: str = "silu"
    bias: bool = False
    gated: bool = True
    names: tuple[str, str] = ("up_proj", "down_proj")
    gate_name: str = "gate_proj"
    fused: str | None = None
    gate_scale: float = 1.0

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
                setattr(self, spec.gate_name, Linear(dim, size, ("embed", "mlp"), make, stack, spec.bias))
            setattr(self, up, Linear(dim, size, ("embed", "mlp"), make, stack, spec.bias))
        setattr(self, down, Linear(size, dim, ("mlp", "embed"), make, stack, spec.bias))
        # Products of two activations have outliers (Fishman et al. 2024). To round them to int8 raised the loss of
        # SmolLM2-135M by 0.040, all other activations by 0.006.
        getattr(self, down).has_outliers = spec.gated

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        spec = self.spec
        in_context, out_context = context.split(2)
        activation = self.act_fn or ACTIVATIONS[spec.activation]
        down_proj = getattr(self, spec.names[1])
        if not spec.gated:
            up = checkpoint_name(getattr(self, spec.names[0])(x, in_context), PRODUCT)
            return down_proj(activation(up), out_context)
        if spec.fused is not None:
            gate, up = jnp.split(checkpoint_name(getattr(self, spec.fused)(x, in_context), PRODUCT), 2, axis=-1)
        else:
            outs = linear(x, [getattr(self, name) for name in (spec.gate_name, spec.names[0])], in_context)
            gate, up = (checkpoint_name(one, PRODUCT) for one in outs)
        gate = gate if spec.gate_scale == 1.0 else gate * spec.gate_scale
        return down_proj(activation(gate) * up, out_context)
