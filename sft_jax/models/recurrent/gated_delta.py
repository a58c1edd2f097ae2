"""The mixer of Qwen3-Next, Qwen3.5 and OLMo hybrid: a short convolution, the gated delta rule, a gated norm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, Linear, linear
from sft_jax.models.mlp import ACTIVATIONS
from sft_jax.models.recurrent.conv import DepthwiseConv
from sft_jax.models.recurrent.delta import gated_delta, gated_delta_step
from sft_jax.models.recurrent.gated_norm import GatedNorm
from sft_jax.models.recurrent.state import RecurrentState
from sft_jax.models.recurrent.whole import whole_sequences
from sft_jax.models.remat import PRODUCT, checkpoint_name
from sft_jax.models.work import Work
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float

_CONVOLVED = "qkv"


@dataclass(frozen=True)
class GatedDeltaSpec:
    """The gated delta rule (:mod:`sft_jax.models.recurrent.delta`) with its projections.

    Attributes:
        num_key_heads, num_value_heads: M and N; N/M value heads share a query and a key.
        key_dim, value_dim: of a head, K and V.
        conv_size: taps of the convolution of queries, keys and values.
        projections: the name of each input projection and the parts of its output, of ``qkvzba``: query, key, value,
            the gate ``z``, and the inputs of ``beta`` and of the decay.
        grouped: whether the output of a projection has the parts of the first key head first, not the first part.
        norm, output: the names of the gated norm and of the output projection.
        convolutions: the names and channels of the convolutions of consecutive channels of ``qkv``; by default one,
            ``conv1d``.
        max_beta: 2 lets a token turn the sign of what the state has for its key; 1 does not.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_size: int
    projections: tuple[tuple[str, str], ...]
    grouped: bool = False
    norm: str = "norm"
    norm_eps: float = 1e-6
    output: str = "out_proj"
    convolutions: tuple[tuple[str, int], ...] = ()
    activation: str = "silu"
    max_beta: float = 1.0

    is_mixer: ClassVar[bool] = True

    def module(self, dim: int, make: Initializer, stack: tuple[int, ...]) -> GatedDelta:
        return GatedDelta(self, dim, make, stack)

    @property
    def sizes(self) -> dict[str, int]:
        """The channels of each part, over all heads."""
        keys, values = self.num_key_heads * self.key_dim, self.num_value_heads * self.value_dim
        return {"q": keys, "k": keys, "v": values, "z": values, "b": self.num_value_heads, "a": self.num_value_heads}


class GatedDelta(nnx.Module):
    """The module of :class:`GatedDeltaSpec`."""

    def __init__(self, spec: GatedDeltaSpec, dim: int, make: Initializer, stack: tuple[int, ...]):
        sizes = spec.sizes
        self.spec = spec
        for name, parts in spec.projections:
            setattr(self, name, Linear(dim, sum(sizes[part] for part in parts), ("embed", "heads"), make, stack))
        self.convolutions = spec.convolutions or (("conv1d", sum(sizes[part] for part in _CONVOLVED)),)
        for name, channels in self.convolutions:
            setattr(self, name, DepthwiseConv(channels, spec.conv_size, False, make, stack))
        # In the ranges of Mamba-2. Their product is the initial decay: heads remember from one to a thousand tokens.
        self.A_log = make.repeat(jnp.log(jnp.linspace(1.0, 16.0, spec.num_value_heads)), stack, ("heads",))
        steps = jnp.geomspace(1e-3, 1e-1, spec.num_value_heads)
        self.dt_bias = make.repeat(jnp.log(jnp.expm1(steps)), stack, ("heads",))
        setattr(self, spec.norm, GatedNorm(spec.value_dim, spec.norm_eps, make, stack))
        setattr(self, spec.output, Linear(sizes["v"], dim, ("heads", "embed"), make, stack))

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], RecurrentState]:
        """Returns the output, and the state after these tokens."""
        in_context, out_context = context.split(2)
        parts = self._project(x, in_context)
        q, k, v, inputs = self._convolve(parts, context)
        q, k = (_normalize(one.astype(jnp.float32)) for one in (q, k))
        q = q * self.spec.key_dim**-0.5
        beta = self.spec.max_beta * jax.nn.sigmoid(parts["b"].astype(jnp.float32))
        steps = jax.nn.softplus(parts["a"].astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        log_decay = -jnp.exp(self.A_log[...].astype(jnp.float32)) * steps
        beta, log_decay = (whole_sequences(one, context, "recurrent_heads") for one in (beta, log_decay))
        if context.cache is not None:
            q, k, v, log_decay, beta = (one[:, 0] for one in (q, k, v, log_decay, beta))
            out, memory = gated_delta_step(q, k, v, log_decay, beta, context.cache.memory)
            out = out[:, None]
        else:
            assert context.segment_ids is not None
            out, memory = gated_delta(q, k, v, log_decay, beta, context.segment_ids)
        out = getattr(self, self.spec.norm)(out, parts["z"].reshape(out.shape))
        out = getattr(self, self.spec.output)(out.reshape(*x.shape[:2], -1), out_context)
        return checkpoint_name(out, PRODUCT), RecurrentState(inputs, memory)

    def mixing_flops(self, work: Work) -> float:
        """Returns the FLOPs of the recurrence, forward and backward.

        Each token and head multiplies the state with its key and its query, and adds an outer product to the state.
        """
        spec = self.spec
        return 3.0 * 3 * 2 * work.tokens * spec.num_value_heads * spec.key_dim * spec.value_dim

    def _project(self, x: Float[Array, "B T D"], context: Context) -> dict[str, Float[Array, "B T C"]]:
        """Returns the parts ``qkvzba``."""
        names = [name for name, _ in self.spec.projections]
        outs = linear(x, [getattr(self, name) for name in names], context)
        found: dict[str, Array] = {}
        for (_, letters), out in zip(self.spec.projections, outs, strict=True):
            out = checkpoint_name(constrain(out, "batch", "length", "heads"), PRODUCT)
            groups = self.spec.num_key_heads if self.spec.grouped else 1
            out = out.reshape(*out.shape[:2], groups, -1)
            ends = list(accumulate(self.spec.sizes[part] // groups for part in letters))
            for part, one in zip(letters, jnp.split(out, ends[:-1], axis=-1), strict=True):
                found[part] = one.reshape(*out.shape[:2], -1)
        return found

    def _convolve(
        self, parts: dict[str, Array], context: Context
    ) -> tuple[Float[Array, "B T M K"], Float[Array, "B T M K"], Float[Array, "B T N V"], Float[Array, "B J-1 C"]]:
        """Returns queries, keys and values after the convolution, and its last inputs."""
        spec = self.spec
        x = jnp.concatenate([parts[part] for part in _CONVOLVED], axis=-1)
        x = whole_sequences(x, context, "heads")
        ends = list(accumulate(channels for _, channels in self.convolutions))[:-1]
        xs = jnp.split(x, ends, axis=-1)
        earlier = [None] * len(xs) if context.cache is None else jnp.split(context.cache.inputs, ends, axis=-1)
        outs, inputs = [], []
        for (name, _), one, before in zip(self.convolutions, xs, earlier, strict=True):
            cache = None if before is None else RecurrentState(before)
            out, last = getattr(self, name)(one, replace(context, cache=cache))
            outs.append(ACTIVATIONS[spec.activation](out))
            inputs.append(last)
        ends = list(accumulate(spec.sizes[part] for part in _CONVOLVED))[:-1]
        heads = (spec.num_key_heads, spec.num_key_heads, spec.num_value_heads)
        q, k, v = (
            whole_sequences(one.reshape(*one.shape[:2], num_heads, -1), context, "recurrent_heads", "head_dim")
            for one, num_heads in zip(jnp.split(jnp.concatenate(outs, axis=-1), ends, axis=-1), heads, strict=True)
        )
        return q, k, v, jnp.concatenate(inputs, axis=-1)


def _normalize(x: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
