"""Multi-head latent attention (DeepSeek-V2, 2024): keys and values are projections of a small latent vector per token.

Training expands the latents into keys and values of all heads. Decoding caches the latents, and moves the projections
to the other side of the products (absorption): a query times an expanded key is the query times the projection, times
the latent. So all heads attend to one key and value per token, the latent itself, and no cached token is expanded.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from sft_jax.models.architecture import Norm, Rope
from sft_jax.models.attention.backend import attention
from sft_jax.models.attention.cached import cached_attention
from sft_jax.models.attention.spec import AttentionSpec
from sft_jax.models.cache import KeyValues, Latents
from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, Linear, linear, make_norm
from sft_jax.models.quantized import in_dtype
from sft_jax.models.remat import PRODUCT, checkpoint_name
from sft_jax.models.rope import rotate_heads
from sft_jax.models.work import Work
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float


@dataclass(frozen=True, kw_only=True)
class LatentAttentionSpec(AttentionSpec):
    """Latent attention with its projections; ``num_kv_heads`` equals ``num_heads``.

    The first channels of a head of queries and keys are not rotated, the last ``rope.dims`` are. The rotated channels
    of a key are the same in all heads.

    Attributes:
        rope: the rotary embedding, with ``dims``.
        kv_rank: the size of the latent of keys and values.
        q_rank: the size of the latent of queries; None for one projection from hidden states to queries.
        norm: the norm of the latents.
        bias: whether the projections from and to hidden states have biases; ``q_proj`` has none.
    """

    rope: Rope
    kv_rank: int
    q_rank: int | None
    norm: Norm
    bias: bool = False

    @property
    def rotated(self) -> int:
        """Returns the number of rotated channels of a head."""
        assert self.rope.dims is not None
        return self.rope.dims

    def module(self, dim: int, make: Initializer, stack: tuple[int, ...]) -> LatentAttention:
        return LatentAttention(self, dim, make, stack)


class LatentAttention(nnx.Module):
    """The module of :class:`LatentAttentionSpec`."""

    def __init__(self, spec: LatentAttentionSpec, dim: int, make: Initializer, stack: tuple[int, ...]):
        assert not spec.sinks
        n, queries = spec.num_heads, spec.num_heads * spec.head_dim
        self.spec, self.v_head_dim = spec, spec.v_head_dim or spec.head_dim
        if spec.q_rank is None:
            self.q_proj = Linear(dim, queries, ("embed", "heads"), make, stack)
        else:
            self.q_a_proj = Linear(dim, spec.q_rank, ("embed", "latent"), make, stack, spec.bias)
            self.q_a_layernorm = make_norm(spec.q_rank, spec.norm, make, stack)
            self.q_b_proj = Linear(spec.q_rank, queries, ("embed", "heads"), make, stack)
        self.kv_a_proj_with_mqa = Linear(dim, spec.kv_rank + spec.rotated, ("embed", "latent"), make, stack, spec.bias)
        self.kv_a_layernorm = make_norm(spec.kv_rank, spec.norm, make, stack)
        expanded = n * (spec.head_dim - spec.rotated + self.v_head_dim)
        self.kv_b_proj = Linear(spec.kv_rank, expanded, ("embed", "kv_heads"), make, stack)
        self.o_proj = Linear(n * self.v_head_dim, dim, ("heads", "embed"), make, stack, spec.bias)

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], Latents]:
        """Returns the output, and the latents of these tokens."""
        spec = self.spec
        in_context, q_context, kv_context, out_context = context.split(4)
        first = self.q_proj if spec.q_rank is None else self.q_a_proj
        products = linear(x, [first, self.kv_a_proj_with_mqa], in_context)
        q, latents = (checkpoint_name(one, PRODUCT) for one in products)
        if spec.q_rank is not None:
            q = checkpoint_name(self.q_b_proj(self.q_a_layernorm(q), q_context), PRODUCT)
        q = constrain(q.reshape(*x.shape[:2], spec.num_heads, -1), "batch", "length", "heads", "head_dim")
        q = jnp.concatenate([q[..., : -spec.rotated], self._rotate(q[..., -spec.rotated :], context)], axis=-1)
        key = self._rotate(latents[..., None, spec.kv_rank :], context)
        latents = self.kv_a_layernorm(latents[..., : spec.kv_rank])
        if context.cache is None:
            out = self._attend(q, key, latents, context, kv_context)
        else:
            out = self._attend_to_cache(q, key, latents, context)
        new = Latents(jnp.concatenate([latents, key[:, :, 0]], axis=-1))
        out = self.o_proj(out.reshape(*x.shape[:2], -1), out_context)
        return checkpoint_name(out, PRODUCT), new

    def mixing_flops(self, work: Work) -> float:
        """Returns the FLOPs of scores and their products with values, forward and backward."""
        return 3.0 * work.squares * self.spec.num_heads * (self.spec.head_dim + self.v_head_dim)

    def _rotate(self, x: Float[Array, "B T N P"], context: Context) -> Float[Array, "B T N P"]:
        return rotate_heads(x, self.spec.rope, *context.sin_cos[self.spec.rope])

    def _attend(
        self,
        q: Float[Array, "B T N H"],
        key: Float[Array, "B T 1 P"],
        latents: Float[Array, "B T C"],
        context: Context,
        kv_context: Context,
    ) -> Float[Array, "B T N Hv"]:
        """Attends to the expanded keys and values of these tokens."""
        spec, num_heads = self.spec, self.spec.num_heads
        expanded = checkpoint_name(self.kv_b_proj(latents, kv_context), PRODUCT)
        expanded = constrain(expanded.reshape(*q.shape[:2], num_heads, -1), "batch", "length", "heads", "head_dim")
        k, v = jnp.split(expanded, [spec.head_dim - spec.rotated], axis=-1)
        k = jnp.concatenate([k, jnp.broadcast_to(key, (*q.shape[:3], spec.rotated))], axis=-1)
        assert context.segment_ids is not None
        return attention(
            q,
            k,
            v,
            context.segment_ids,
            window=spec.window,
            softcap=spec.softcap,
            scale=spec.scale,
            backend=context.backend,
            chunk=spec.chunk,
        )

    def _attend_to_cache(
        self, q: Float[Array, "B 1 N H"], key: Float[Array, "B 1 1 P"], latents: Float[Array, "B 1 C"], context: Context
    ) -> Float[Array, "B 1 N Hv"]:
        """Attends to cached latents as to the keys and values of one head."""
        spec = self.spec
        to_keys, to_values = jnp.split(self._expansion(context, q.dtype), [spec.head_dim - spec.rotated], axis=-1)
        q_latent = jnp.einsum("btnh,cnh->btnc", q[..., : -spec.rotated], to_keys)
        q = jnp.concatenate([q_latent, q[..., -spec.rotated :]], axis=-1)
        new = jnp.concatenate([latents[:, :, None], key], axis=-1)
        cached = context.cache.entries[:, :, None]
        # The rotated keys are also passed as values, and dropped, because a slice would copy the cache.
        out = cached_attention(
            constrain(q, "replica", "unsplit_length", "heads", "head_dim"),
            new,
            new,
            KeyValues(cached, cached),
            context.positions,
            window=spec.window,
            softcap=spec.softcap,
            scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
            chunk=spec.chunk,
        )
        out = constrain(out, "replica", "unsplit_length", "heads", "head_dim")[..., : spec.kv_rank]
        return jnp.einsum("btnc,cnh->btnh", out, to_values)

    def _expansion(self, context: Context, dtype: jnp.dtype) -> Float[Array, "C N HHv"]:
        """Returns ``kv_b_proj`` as a matrix, with its adapter."""
        if self.kv_b_proj.variant is None:
            matrix = in_dtype(self.kv_b_proj.matrix(context), dtype)
        else:
            matrix = self.kv_b_proj(jnp.eye(self.spec.kv_rank, dtype=dtype)[None], context)[0]
        return matrix.reshape(self.spec.kv_rank, self.spec.num_heads, -1)
