"""The self-attention module: projections, query and key norms, rotary embedding, attention, and the cache."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from sft_jax.models.architecture import Norm, Rope
from sft_jax.models.attention.backend import attention
from sft_jax.models.attention.cached import cached_attention
from sft_jax.models.attention.spec import AttentionSpec
from sft_jax.models.cache import KeyValues
from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, Linear, linear, make_norm
from sft_jax.models.remat import PRODUCT, checkpoint_name
from sft_jax.models.rope import rotate_heads
from sft_jax.models.work import Work
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float


@dataclass(frozen=True)
class SelfAttentionSpec(AttentionSpec):
    """Grouped-query attention with its projections.

    Attributes:
        rope: rotary embedding of queries and keys; None for no rotation.
        qk_norm: norm over the head dimension of queries and keys; None for no norm.
        qk_norm_heads: whether it is over all heads together instead.
        qk_norm_last: whether it comes after the rotation.
        gated: whether ``q_proj`` also returns a gate for each channel of each head, after the query of the head; the
            output of attention is multiplied by its sigmoid.
    """

    rope: Rope | None = None
    qk_norm: Norm | None = None
    qk_norm_heads: bool = False
    qk_norm_last: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    gated: bool = False

    def module(self, dim: int, make: Initializer, stack: tuple[int, ...]) -> SelfAttention:
        return SelfAttention(self, dim, make, stack)


class SelfAttention(nnx.Module):
    """The module of :class:`SelfAttentionSpec`."""

    def __init__(self, spec: SelfAttentionSpec, dim: int, make: Initializer, stack: tuple[int, ...]):
        n, k, h = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.spec = spec
        self.q_proj = Linear(dim, n * h * (2 if spec.gated else 1), ("embed", "heads"), make, stack, spec.qkv_bias)
        self.k_proj = Linear(dim, k * h, ("embed", "kv_heads"), make, stack, spec.qkv_bias)
        self.v_proj = Linear(dim, k * h, ("embed", "kv_heads"), make, stack, spec.qkv_bias)
        self.o_proj = Linear(n * h, dim, ("heads", "embed"), make, stack, spec.o_bias)
        sizes = (n * h, k * h) if spec.qk_norm_heads else (h, h)
        norms = [None if spec.qk_norm is None else make_norm(size, spec.qk_norm, make, stack) for size in sizes]
        self.q_norm, self.k_norm = (nnx.data(norm) for norm in norms)

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], KeyValues]:
        """Returns the output, and the keys and values of these tokens."""
        in_context, out_context = context.split(2)
        q, k, v = linear(x, [self.q_proj, self.k_proj, self.v_proj], in_context)
        gate = None
        if self.spec.gated:
            q, gate = self._split_gate(q)
        if self.spec.qk_norm_heads:
            q, k = self._norms(q, k)
        q = self._heads(q, self.spec.num_heads, "heads")
        k, v = (self._heads(one, self.spec.num_kv_heads, "kv_heads") for one in (k, v))
        if not self.spec.qk_norm_heads and not self.spec.qk_norm_last:
            q, k = self._norms(q, k)
        if (rope := self.spec.rope) is not None:
            sin_cos = context.sin_cos[rope]
            q, k = rotate_heads(q, rope, *sin_cos), rotate_heads(k, rope, *sin_cos)
        if self.spec.qk_norm_last:
            q, k = self._norms(q, k)
        q, k, v = (checkpoint_name(one, PRODUCT) for one in (q, k, v))
        out = self._attend(q, k, v, context)
        if gate is not None:
            out = out * jax.nn.sigmoid(gate)
        return checkpoint_name(self.o_proj(out.reshape(*x.shape[:2], -1), out_context), PRODUCT), KeyValues(k, v)

    def mixing_flops(self, work: Work) -> float:
        """Returns the FLOPs of scores and their products with values, forward and backward."""
        return 6.0 * work.squares * self.spec.num_heads * self.spec.head_dim

    def _split_gate(self, q: Float[Array, "B T 2NH"]) -> tuple[Float[Array, "B T NH"], Float[Array, "B T N H"]]:
        q, gate = jnp.split(q.reshape(*q.shape[:2], self.spec.num_heads, -1), 2, axis=-1)
        gate = constrain(checkpoint_name(gate, PRODUCT), "batch", "length", "heads", "head_dim")
        return q.reshape(*q.shape[:2], -1), gate

    def _norms(self, q: Array, k: Array) -> tuple[Array, Array]:
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k))

    def _attend(self, q: Array, k: Array, v: Array, context: Context) -> Float[Array, "B T N H"]:
        spec = self.spec
        if context.cache is not None:
            out = cached_attention(q, k, v, context.cache, context.positions, spec.window, spec.softcap, spec.scale)
            return constrain(out, "replica", "unsplit_length", "heads", "head_dim")
        assert context.segment_ids is not None
        return attention(q, k, v, context.segment_ids, spec.window, spec.softcap, spec.scale, context.backend)

    def _heads(self, x: Float[Array, "B T NH"], num_heads: int, axis: str) -> Float[Array, "B T N H"]:
        return constrain(x.reshape(*x.shape[:2], num_heads, self.spec.head_dim), "batch", "length", axis, "head_dim")
