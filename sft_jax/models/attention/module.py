"""The self-attention module: projections, query and key norms, rotary embedding, attention, and the cache."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from sft_jax.models.architecture import Norm, Rope, Temperature
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
        temperature: multiplies queries by a function of their position; None for no such factor.
        qk_norm: norm over the head dimension of queries and keys; None for no norm.
        qk_norm_heads: whether it is over all heads together instead.
        qk_norm_last: whether it comes after the rotation.
        v_norm: norm over the head dimension of values; None for no norm.
        reads: the name under which an earlier layer publishes the keys and values that this one attends to; None for
            its own. A layer that reads projects queries only and has no cache; it is neither ``fused`` nor ``gated``.
        value_is_key: whether there is no ``v_proj``, and values are the keys before norm and rotation.
        gated: whether ``q_proj`` also returns a gate for each channel of each head, after the query of the head; the
            output of attention is multiplied by its sigmoid.
        fused: the name of one projection for queries, keys and values; None for three.
        fused_by_head: whether its outputs are the query, key and value of each head, not those of all heads.
        o_name, norm_names: the names of the output projection, and of the norms of queries and keys.
    """

    rope: Rope | None = None
    temperature: Temperature | None = None
    qk_norm: Norm | None = None
    qk_norm_heads: bool = False
    qk_norm_last: bool = False
    v_norm: Norm | None = None
    reads: str | None = None
    value_is_key: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    gated: bool = False
    fused: str | None = None
    fused_by_head: bool = False
    o_name: str = "o_proj"
    norm_names: tuple[str, str] = ("q_norm", "k_norm")

    def module(self, dim: int, make: Initializer, stack: tuple[int, ...]) -> SelfAttention:
        return SelfAttention(self, dim, make, stack)

    def no_entries(self, x: Float[Array, "B T D"]) -> KeyValues:
        """Returns zeros in place of the keys and values of these tokens."""
        shape = (*x.shape[:2], self.num_kv_heads, self.head_dim)
        zeros = constrain(jnp.zeros(shape, x.dtype), "batch", "length", "kv_heads", "head_dim")
        return KeyValues(zeros, zeros)


class SelfAttention(nnx.Module):
    """The module of :class:`SelfAttentionSpec`."""

    def __init__(self, spec: SelfAttentionSpec, dim: int, make: Initializer, stack: tuple[int, ...]):
        n, k, h = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.spec = spec

        def project(name: str, size: int, axis: str, num_heads: int | None) -> None:
            layer = Linear(dim, size, ("embed", axis), make, stack, spec.qkv_bias)
            layer.out_heads = num_heads
            setattr(self, name, layer)

        if spec.fused is not None:
            project(spec.fused, (n + 2 * k) * h, "heads", None)
        else:
            project("q_proj", n * h * (2 if spec.gated else 1), "heads", n)
            if spec.reads is None:
                project("k_proj", k * h, "kv_heads", k)
            if spec.reads is None and not spec.value_is_key:
                project("v_proj", k * h, "kv_heads", k)
        out = Linear(n * h, dim, ("heads", "embed"), make, stack, spec.o_bias)
        out.in_heads = n
        setattr(self, spec.o_name, out)
        if spec.qk_norm is not None:
            sizes = (n * h, k * h) if spec.qk_norm_heads else (h, h)
            sizes = sizes if spec.reads is None else sizes[:1]
            for name, size in zip(spec.norm_names, sizes, strict=False):
                setattr(self, name, make_norm(size, spec.qk_norm, make, stack))
        self.sinks = nnx.data(make.constant(0.0, (*stack, n), ("heads",)) if spec.sinks else None)
        self.v_norm = nnx.data(None if spec.v_norm is None else make_norm(h, spec.v_norm, make, stack))

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], KeyValues | None]:
        """Returns the output, and the keys and values of these tokens; None if they are those of another layer."""
        spec = self.spec
        if spec.reads is not None:
            return self._read(x, context), None
        in_context, out_context = context.split(2)
        q, k, v, gate = self._project(x, in_context)
        if spec.qk_norm_heads:
            q, k = self._norms([q, k])
        q = constrain(q, "batch", "length", "heads", "head_dim")
        k, v = (constrain(one, "batch", "length", "kv_heads", "head_dim") for one in (k, v))
        q, k = self._rotated([q, k], context)
        if self.v_norm is not None:
            v = self.v_norm(v)
        q, k, v = (checkpoint_name(one, PRODUCT) for one in (q, k, v))
        out = self._attend(q, k, v, context, context.cache)
        if gate is not None:
            out = out * jax.nn.sigmoid(gate)
        return self._out(out, out_context), KeyValues(k, v)

    def mixing_flops(self, work: Work) -> float:
        """Returns the FLOPs of scores and their products with values, forward and backward."""
        return 6.0 * work.squares * self.spec.num_heads * self.spec.head_dim

    def _read(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        """Returns the output of a layer that attends to the keys and values of an earlier one."""
        spec = self.spec
        assert spec.reads is not None
        assert spec.fused is None
        assert not spec.gated
        in_context, out_context = context.split(2)
        q = self._projection("q_proj")(x, in_context)
        if spec.qk_norm_heads:
            (q,) = self._norms([q])
        (q,) = self._rotated([constrain(q, "batch", "length", "heads", "head_dim")], context)
        q = checkpoint_name(q, PRODUCT)
        shared, cache = context.shared[spec.reads], context.shared_cache.get(spec.reads)
        return self._out(self._attend(q, shared.k, shared.v, context, cache), out_context)

    def _out(self, out: Float[Array, "B T N H"], context: Context) -> Float[Array, "B T D"]:
        return checkpoint_name(self._projection(self.spec.o_name)(out, context), PRODUCT)

    def _projection(self, name: str) -> Linear:
        return getattr(self, name)

    def _project(self, x: Float[Array, "B T D"], context: Context) -> tuple[Array, Array, Array, Array | None]:
        """Returns queries, keys and values by heads ``[B, T, heads, H]``, and the gate."""
        spec = self.spec
        if spec.fused is not None:
            return *self._split(getattr(self, spec.fused)(x, context)), None
        names = ("q_proj", "k_proj") if spec.value_is_key else ("q_proj", "k_proj", "v_proj")
        q, k, *rest = linear(x, [getattr(self, name) for name in names], context)
        gate = None
        if spec.gated:
            q, gate = jnp.split(q, 2, axis=-1)
            gate = constrain(checkpoint_name(gate, PRODUCT), "batch", "length", "heads", "head_dim")
        return q, k, rest[0] if rest else k, gate

    def _split(self, qkv: Float[Array, "B T O"]) -> tuple[Array, Array, Array]:
        """Splits the outputs of the fused projection into queries, keys and values by heads."""
        spec = self.spec
        if spec.fused_by_head:
            q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], spec.num_heads, -1), 3, axis=-1)
            return q, k, v
        n, k = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        parts = qkv[..., :n], qkv[..., n : n + k], qkv[..., n + k :]
        q, k, v = (part.reshape(*part.shape[:2], -1, spec.head_dim) for part in parts)
        return q, k, v

    def _rotated(self, heads: list[Array], context: Context) -> list[Float[Array, "B T _ H"]]:
        """Applies norms over the head dimension, the rotation and the temperature to queries, and keys if given."""
        spec = self.spec
        if not spec.qk_norm_heads and not spec.qk_norm_last:
            heads = self._norms(heads)
        if (rope := spec.rope) is not None:
            heads = [rotate_heads(one, rope, *context.sin_cos[rope]) for one in heads]
        if spec.qk_norm_last:
            heads = self._norms(heads)
        if (heat := spec.temperature) is not None:
            steps = (context.positions + heat.offset) // heat.length
            factor = 1.0 + heat.beta * jnp.log1p(steps.astype(jnp.float32))
            q, *keys = heads
            heads = [(q.astype(jnp.float32) * factor[:, :, None, None]).astype(q.dtype), *keys]
        return heads

    def _norms(self, heads: list[Array]) -> list[Array]:
        """Normalizes queries, and keys if given."""
        if self.spec.qk_norm is None:
            return heads
        pairs = [(getattr(self, name), one) for name, one in zip(self.spec.norm_names, heads, strict=False)]
        if not self.spec.qk_norm_heads:
            return [norm(one) for norm, one in pairs]
        return [norm(one.reshape(*one.shape[:2], -1)).reshape(one.shape) for norm, one in pairs]

    def _attend(
        self, q: Array, k: Array, v: Array, context: Context, cache: KeyValues | None
    ) -> Float[Array, "B T N H"]:
        """Attends to ``k`` and ``v``, and to the cache of earlier tokens in one-token decoding."""
        spec = self.spec
        options = {
            "window": spec.window,
            "softcap": spec.softcap,
            "scale": spec.scale,
            "sinks": None if self.sinks is None else self.sinks[...],
            "chunk": spec.chunk,
        }
        if cache is not None:
            out = cached_attention(q, k, v, cache, context.positions, **options)
            return constrain(out, "replica", "unsplit_length", "heads", "head_dim")
        assert context.segment_ids is not None
        return attention(q, k, v, context.segment_ids, **options, backend=context.backend)
