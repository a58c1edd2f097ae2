"""The mixer of Qwen3-Next, Qwen3.5 and OLMo hybrid: a short convolution, the gated delta rule, a gated norm."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, Linear, linear
from sft_jax.models.mlp import ACTIVATIONS
from sft_jax.models.recurrent.conv import causal_conv, last_inputs
from sft_jax.models.recurrent.delta import gated_delta, gated_delta_step
from sft_jax.models.recurrent.state import RecurrentState
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
        conv_size: the number of tokens that the convolution of queries, keys and values reaches.
        projections: the name of each input projection and the parts of its output, of ``qkvzba``: query, key, value,
            the gate ``z``, and the inputs of ``beta`` and of the decay.
        grouped: whether the output of a projection has the parts of the first key head first, not the first part.
        norm, output: the names of the gated norm and of the output projection.
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
        self.conv1d = _Convolution(sum(sizes[part] for part in _CONVOLVED), spec.conv_size, make, stack)
        decay, steps = _initial_decays(spec.num_value_heads)
        self.A_log = _per_head(np.log(decay), stack)
        self.dt_bias = _per_head(np.log(np.expm1(steps)), stack)
        setattr(self, spec.norm, GatedRMSNorm(spec.value_dim, spec.norm_eps, make, stack))
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
            out = checkpoint_name(out, PRODUCT)
            groups = self.spec.num_key_heads if self.spec.grouped else 1
            out = out.reshape(*out.shape[:2], groups, -1)
            ends = list(accumulate(self.spec.sizes[part] // groups for part in letters))
            for part, one in zip(letters, jnp.split(out, ends[:-1], axis=-1), strict=True):
                found[part] = self._whole(one.reshape(*out.shape[:2], -1), context)
        return found

    def _convolve(
        self, parts: dict[str, Array], context: Context
    ) -> tuple[Float[Array, "B T M K"], Float[Array, "B T M K"], Float[Array, "B T N V"], Float[Array, "B J-1 C"]]:
        """Returns queries, keys and values after the convolution, and its last inputs."""
        spec, taps = self.spec, self.spec.conv_size - 1
        ends = list(accumulate(spec.sizes[part] for part in _CONVOLVED))[:-1]
        weights = jnp.split(self.conv1d.weight[...], ends)
        before = [None] * 3 if context.cache is None else jnp.split(context.cache.inputs, ends, axis=-1)
        heads = (spec.num_key_heads, spec.num_key_heads, spec.num_value_heads)
        outs, inputs = [], []
        for part, weight, earlier, num_heads in zip(_CONVOLVED, weights, before, heads, strict=True):
            x = parts[part]
            out = ACTIVATIONS[spec.activation](causal_conv(x, weight, None, context.positions, earlier))
            outs.append(self._whole(out.reshape(*out.shape[:2], num_heads, -1), context, "head_dim"))
            if earlier is not None:
                inputs.append(jnp.concatenate([earlier, x], axis=1)[:, 1:])
            else:
                assert context.segment_ids is not None
                inputs.append(last_inputs(x, context.segment_ids, taps))
        q, k, v = outs
        return q, k, v, jnp.concatenate(inputs, axis=-1)

    def _whole(self, x: Array, context: Context, *more: str) -> Array:
        """Keeps sequences whole on each device, and distributes heads instead."""
        batch = "replica" if context.cache is not None else "batch"
        return constrain(x, batch, "unsplit_length", "recurrent_heads", *more)


class GatedRMSNorm(nnx.Module):
    """An RMS norm over the head dimension, multiplied by ``silu(gate)``; computed in float32 and rounded once."""

    def __init__(self, dim: int, eps: float, make: Initializer, stack: tuple[int, ...]):
        self.eps = eps
        self.weight = make.constant(1.0, (*stack, dim), ("norm",))

    def __call__(self, x: Float[Array, "*B V"], gate: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        wide = wide * self.weight[...].astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
        return wide.astype(x.dtype)


class _Convolution(nnx.Module):
    """The weight of a depthwise convolution."""

    def __init__(self, channels: int, size: int, make: Initializer, stack: tuple[int, ...]):
        self.weight = make.normal((*stack, channels, 1, size), ("norm", "norm", "norm"))


def _initial_decays(num_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``exp(A_log)`` and ``softplus(dt_bias)`` for training from scratch, in the ranges of Mamba 2.

    Their product is the initial decay per token: heads remember from about one to a thousand tokens.
    """
    return np.linspace(1.0, 16.0, num_heads), np.geomspace(1e-3, 1e-1, num_heads)


def _per_head(values: np.ndarray, stack: tuple[int, ...]) -> nnx.Param:
    return nnx.Param(jnp.broadcast_to(jnp.asarray(values, jnp.float32), (*stack, len(values))), axes=("norm",))


def _normalize(x: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
