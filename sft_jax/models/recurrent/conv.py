"""Causal depthwise convolution within segments."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer
from sft_jax.typing import Array, Float, Int


class DepthwiseConv(nnx.Module):
    """A causal convolution of each channel by itself: ``weight`` ``[*stack, C, 1, J]`` and ``bias``."""

    def __init__(self, channels: int, taps: int, use_bias: bool, make: Initializer, stack: tuple[int, ...]):
        # The default of PyTorch has this standard deviation.
        self.weight = make.normal((*stack, channels, 1, taps), ("heads", "norm", "norm"), (3 * taps) ** -0.5)
        bias = make.constant(0.0, (*stack, channels), ("heads",)) if use_bias else None
        self.bias: nnx.Param | None = nnx.data(bias)

    def __call__(
        self, x: Float[Array, "B T C"], context: Context
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B J-1 C"]]:
        """Returns the output, and the last inputs, for the next token. ``context.cache`` is a ``RecurrentState``."""
        weight = self.weight[...]
        bias = None if self.bias is None else self.bias[...]
        if context.cache is not None:
            before = context.cache.inputs
            out = causal_conv(x, weight, bias, context.positions, before)
            return out, jnp.concatenate([before, x], axis=1)[:, 1:]
        assert context.segment_ids is not None
        out = causal_conv(x, weight, bias, context.positions)
        return out, last_inputs(x, context.segment_ids, weight.shape[-1] - 1)


def causal_conv(
    x: Float[Array, "B T C"],
    weight: Float[Array, "C 1 J"],
    bias: Float[Array, "C"] | None,
    positions: Int[Array, "B T"],
    before: Float[Array, "B J-1 C"] | None = None,
) -> Float[Array, "B T C"]:
    """Computes ``y[t] = bias + Σ_j weight[J-1-j] · x[t-j]`` over the tokens of t's segment, summed in float32.

    Args:
        positions: position of each token within its segment; tap j is used iff ``j <= positions[t]``.
        before: the inputs before the first token, in a decoding step.
    """
    taps = weight.shape[-1]
    weight = weight[:, 0].astype(jnp.float32)
    length = x.shape[1]
    start = jnp.zeros((x.shape[0], taps - 1, x.shape[2]), x.dtype) if before is None else before
    padded = jnp.concatenate([start, x], axis=1)
    total = jnp.zeros(x.shape, jnp.float32) if bias is None else jnp.broadcast_to(bias.astype(jnp.float32), x.shape)
    for j in range(taps):
        shifted = padded[:, taps - 1 - j : taps - 1 - j + length].astype(jnp.float32)
        total += jnp.where(positions[..., None] >= j, shifted * weight[:, taps - 1 - j], 0.0)
    return total.astype(x.dtype)


def last_inputs(x: Float[Array, "B T C"], segment_ids: Int[Array, "B T"], num: int) -> Float[Array, "B num C"]:
    """Returns the last ``num`` inputs before the padding at the end, with zeros before the first token.

    For prompts: each row has one segment.
    """
    length = jnp.sum(segment_ids > 0, axis=1)
    index = length[:, None] - num + jnp.arange(num)
    rows = jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=1)
    return jnp.where(index[..., None] >= 0, rows, 0)
