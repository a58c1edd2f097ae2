"""The short convolution of LFM2: ``out_proj(C · conv(B · x))``, with B, C and x from ``in_proj``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, Linear
from sft_jax.models.recurrent.conv import DepthwiseConv
from sft_jax.models.recurrent.state import RecurrentState
from sft_jax.models.recurrent.whole import whole_sequences
from sft_jax.models.remat import PRODUCT, checkpoint_name
from sft_jax.typing import Array, Float


@dataclass(frozen=True)
class ShortConvSpec:
    """A gated causal convolution over the model dimension.

    Attributes:
        conv_size: taps of the convolution.
        bias: whether the convolution and both projections have biases.
    """

    conv_size: int
    bias: bool = False

    is_mixer: ClassVar[bool] = True

    def module(self, dim: int, make: Initializer, stack: tuple[int, ...]) -> ShortConv:
        return ShortConv(self, dim, make, stack)


class ShortConv(nnx.Module):
    """The module of :class:`ShortConvSpec`."""

    def __init__(self, spec: ShortConvSpec, dim: int, make: Initializer, stack: tuple[int, ...]):
        self.spec = spec
        self.in_proj = Linear(dim, 3 * dim, ("embed", "heads"), make, stack, spec.bias)
        self.conv = DepthwiseConv(dim, spec.conv_size, spec.bias, make, stack)
        self.out_proj = Linear(dim, dim, ("heads", "embed"), make, stack, spec.bias)

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], RecurrentState]:
        """Returns the output, and the state after the last token."""
        in_context, out_context = context.split(2)
        projected = checkpoint_name(self.in_proj(x, in_context), PRODUCT)
        b, c, x = (whole_sequences(one, context, "recurrent_heads") for one in jnp.split(projected, 3, axis=-1))
        convolved, inputs = self.conv(b * x, context)
        out = checkpoint_name(self.out_proj(c * convolved, out_context), PRODUCT)
        return out, RecurrentState(inputs)
