"""The decoder: Llama, Mistral, Qwen2 and Qwen3 as one Flax NNX module.

Attribute names are Hugging Face's. All decoder layers live in one ``DecoderLayer`` whose parameters carry a leading
dimension L and are scanned over, so compile time does not grow with depth. Linear kernels are ``[in, out]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sft_jax.architecture import Architecture
from sft_jax.models.attention.cached import cached_attention
from sft_jax.models.attention.kernel import XLA, Kernel, attention
from sft_jax.models.cache import KeyValues
from sft_jax.models.head import Head
from sft_jax.models.projection import Adapter, project
from sft_jax.models.quantized import Weight, gathered_matrix, matrix_of, rows_of
from sft_jax.models.remat import PRODUCT, keep, rematerialised
from sft_jax.models.rope import rotate, sin_cos
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float, Int

Attend = Callable[[Array, Array, Array], Array]  # q, k, v of the tokens at hand -> what each of them sees


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Place:
    """Where in the network something is computed."""

    layer: Float[Array, ""]  # the number of the decoder layer
    dropout_key: Array | None  # None: no dropout
    # Whether products are made where the weights lie, of each device's part of the model dimension, and then summed.
    # Else weights are gathered where the rows are, which many tokens are worth, and one a row is not.
    weights_stay: bool = field(default=False, metadata={"static": True})

    def split(self, num: int) -> list[Place]:
        """The same layer, with a dropout key for each of ``num`` users."""
        keys = [None] * num if self.dropout_key is None else jax.random.split(self.dropout_key, num)
        return [replace(self, dropout_key=key) for key in keys]

    @property
    def stream(self) -> tuple[str, str, str]:
        """Logical axes of the hidden states that layers add to."""
        return ("replica", "whole_length", "embed") if self.weights_stay else ("batch", "length", "activation")


class Initializer:
    """Makes the parameters of a network: normal weights, unit norms, zero biases, all float32."""

    def __init__(self, key: Array, stddev: float):
        self._rngs = nnx.Rngs(key)
        self._stddev = stddev

    def normal(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        return nnx.Param(self._stddev * jax.random.normal(self._rngs(), shape, jnp.float32), axes=axes)

    def ones(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        return nnx.Param(jnp.ones(shape, jnp.float32), axes=axes)

    def zeros(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """``y = x · kernel + bias``, with an optional low-rank adapter ``scale · (dropout(x) · lora_a) · lora_b``."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        axes: tuple[str, str],
        make: Initializer,
        stack: tuple[int, ...] = (),
        use_bias: bool = False,
    ):
        self.axes = axes
        self.kernel: Weight = make.normal((*stack, in_dim, out_dim), axes)
        self.bias: nnx.Param | None = nnx.data(make.zeros((*stack, out_dim), axes[1:]) if use_bias else None)
        self.lora_a: nnx.LoRAParam | None = nnx.data(None)
        self.lora_b: nnx.LoRAParam | None = nnx.data(None)
        self.lora_scale = 0.0
        self.lora_dropout = 0.0
        self.lora_merged = False

    def __call__(self, x: Float[Array, "*B in"], place: Place) -> Float[Array, "*B out"]:
        """Computed in the dtype of ``x``."""
        return linear(x, [self], place)[0]

    def adapter(self) -> Adapter | None:
        """Its two matrices, where it has one."""
        if self.lora_a is None or self.lora_b is None:
            return None
        return Adapter(self.lora_a[...], self.lora_b[...])


def linear(x: Float[Array, "*B in"], layers: list[Linear], place: Place) -> list[Array]:
    """Several layers of one input, which share its products with their adapters."""
    number, dropout_key = place.layer, place.dropout_key
    adapters, scales = [layer.adapter() for layer in layers], [layer.lora_scale for layer in layers]
    kernels = [(matrix_of if place.weights_stay else gathered_matrix)(layer.kernel) for layer in layers]
    dropped = [dropout_key is not None and layer.lora_dropout > 0 and layer.adapter() is not None for layer in layers]
    if dropout_key is None or not any(dropped):
        # For a token a row it would take longer to add the adapter to the kernel than to multiply by both.
        merged = any(layer.lora_merged for layer in layers) and not place.weights_stay
        outs = project(x, kernels, adapters, scales, number, merged)
    else:  # each adapter has an input of its own
        outs = project(x, kernels, [None] * len(layers), scales, number)
        for i, key in enumerate(jax.random.split(dropout_key, len(layers))):
            adapter, rate = adapters[i], layers[i].lora_dropout
            if adapter is not None:
                kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
                dropped_x = jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))
                outs[i] += project(dropped_x, [None], [adapter], [scales[i]], number)[0]
    return [
        out if layer.bias is None else out + _everywhere(layer.bias[...], out)
        for out, layer in zip(outs, layers, strict=True)
    ]


def _everywhere(vector: Float[Array, "D"], x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """A vector at every position, in the dtype of ``x``; in this order its gradient is added up in float32."""
    return jnp.broadcast_to(vector.astype(jnp.float32), x.shape).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), statistics in float32."""

    def __init__(self, dim: int, eps: float, make: Initializer, stack: tuple[int, ...] = ()):
        self.eps = eps
        self.scale = make.ones((*stack, dim), ("norm",))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * _everywhere(self.scale[...], x)


class Embedding(nnx.Module):
    """The token table ``[V, D]``."""

    def __init__(self, vocab_size: int, dim: int, make: Initializer):
        self.embedding: Weight = make.normal((vocab_size, dim), ("vocab", "embed"))

    def __call__(self, ids: Int[Array, "B T"], dtype: Any, weights_stay: bool = False) -> Float[Array, "B T D"]:
        # The table stays split along D: look up every row's slice of D, then trade slices of D for slots, and then for
        # rows. Both at once, and the compiler would gather all of it on each device.
        ids = constrain(ids, "replica", "whole_length")
        x = constrain(rows_of(self.embedding, ids, dtype), "replica", "whole_length", "embed")
        if weights_stay:
            return x
        x = constrain(x, "replica", "length", "embed_of_slots")
        return constrain(x, "batch", "length", "activation")


class SelfAttention(nnx.Module):
    def __init__(self, arch: Architecture, make: Initializer, stack: tuple[int, ...]):
        d, h = arch.hidden_size, arch.head_dim
        n, k = arch.num_heads, arch.num_kv_heads
        self.num_heads, self.num_kv_heads, self.head_dim = n, k, h
        self.q_proj = Linear(d, n * h, ("embed", "heads"), make, stack, arch.qkv_bias)
        self.k_proj = Linear(d, k * h, ("embed", "kv_heads"), make, stack, arch.qkv_bias)
        self.v_proj = Linear(d, k * h, ("embed", "kv_heads"), make, stack, arch.qkv_bias)
        self.o_proj = Linear(n * h, d, ("heads", "embed"), make, stack, arch.o_bias)
        self.q_norm: RMSNorm | None = nnx.data(RMSNorm(h, arch.norm_eps, make, stack) if arch.qk_norm else None)
        self.k_norm: RMSNorm | None = nnx.data(RMSNorm(h, arch.norm_eps, make, stack) if arch.qk_norm else None)

    def __call__(self, x, sin, cos, attend: Attend, place: Place) -> tuple[Float[Array, "B T D"], KeyValues]:
        of_inputs, of_output = place.split(2)
        q, k, v = linear(x, [self.q_proj, self.k_proj, self.v_proj], of_inputs)
        q = self._heads(q, self.num_heads, "heads")
        k, v = (self._heads(one, self.num_kv_heads, "kv_heads") for one in (k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (keep(one, PRODUCT) for one in (rotate(q, sin, cos), rotate(k, sin, cos), v))
        out = attend(q, k, v)
        return keep(self.o_proj(out.reshape(*x.shape[:2], -1), of_output), PRODUCT), KeyValues(k, v)

    def _heads(self, x: Float[Array, "B T NH"], num_heads: int, axis: str) -> Float[Array, "B T N H"]:
        return constrain(x.reshape(*x.shape[:2], num_heads, self.head_dim), "batch", "length", axis, "head_dim")


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, arch: Architecture, make: Initializer, stack: tuple[int, ...]):
        d, f = arch.hidden_size, arch.intermediate_size
        self.gate_proj = Linear(d, f, ("embed", "mlp"), make, stack, arch.mlp_bias)
        self.up_proj = Linear(d, f, ("embed", "mlp"), make, stack, arch.mlp_bias)
        self.down_proj = Linear(f, d, ("mlp", "embed"), make, stack, arch.mlp_bias)

    def __call__(self, x: Float[Array, "B T D"], place: Place) -> Float[Array, "B T D"]:
        of_inputs, of_output = place.split(2)
        gate, up = (keep(one, PRODUCT) for one in linear(x, [self.gate_proj, self.up_proj], of_inputs))
        return self.down_proj(jax.nn.silu(gate) * up, of_output)


class DecoderLayer(nnx.Module):
    def __init__(self, arch: Architecture, make: Initializer, stack: tuple[int, ...]):
        self.input_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps, make, stack)
        self.self_attn = SelfAttention(arch, make, stack)
        self.post_attention_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps, make, stack)
        self.mlp = MLP(arch, make, stack)

    def __call__(self, x, sin, cos, attend: Attend, place: Place) -> tuple[Float[Array, "B T D"], KeyValues]:
        of_attention, of_mlp = place.split(2)
        attended, seen = self.self_attn(self.input_layernorm(x), sin, cos, attend, of_attention)
        x = constrain(x + attended, *place.stream)
        x = x + self.mlp(self.post_attention_layernorm(x), of_mlp)
        return constrain(x, *place.stream), seen


class Decoder(nnx.Module):
    """Token ids to final hidden states, and hidden states to logits.

    Build it under ``nnx.eval_shape`` when weights are read from files: nothing is then computed or allocated.
    """

    def __init__(
        self,
        arch: Architecture,
        key: Array,
        dtype: Any = jnp.float32,
        remat: str = "none",
        kernel: Kernel = XLA,
    ):
        make = Initializer(key, arch.initializer_range)
        self.arch, self.dtype, self.remat, self.kernel = arch, dtype, remat, kernel
        self.embed_tokens = Embedding(arch.vocab_size, arch.hidden_size, make)
        self.layers = DecoderLayer(arch, make, (arch.num_layers,))
        self.norm = RMSNorm(arch.hidden_size, arch.norm_eps, make)
        self.lm_head: Linear | None = nnx.data(
            None if arch.tie_word_embeddings else Linear(arch.hidden_size, arch.vocab_size, ("embed", "vocab"), make)
        )

    def __call__(
        self,
        inputs: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm, in the compute dtype. ``dropout_key`` turns adapter dropout on."""
        hidden, _ = self._run(inputs, positions, _within(segment_ids, self.kernel), dropout_key=dropout_key)
        return hidden

    def prefill(
        self, inputs: Int[Array, "B T"], segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """What :meth:`__call__` gives, and the keys and values ``[L, B, T, K, H]`` that later tokens attend to.

        Prompts have any length, so attention is the ``xla`` kernel's.
        """
        return self._run(inputs, positions, _within(segment_ids, replace(self.kernel, name="xla")), keep=True)

    def decode(
        self, inputs: Int[Array, "B 1"], positions: Int[Array, "B 1"], cache: KeyValues
    ) -> tuple[Float[Array, "B 1 D"], KeyValues]:
        """One more token a row, against a cache whose slot ``s`` holds position ``s``.

        Weights that devices share are not gathered: attention alone is computed where the rows are.

        Returns:
            its hidden states, and its keys and values ``[L, B, 1, K, H]``, to be written into slot ``positions``.
        """

        def attend(window: int | None, layer_cache: KeyValues) -> Attend:
            def one(q: Array, k: Array, v: Array) -> Array:
                out = cached_attention(q, k, v, layer_cache, positions, window)
                return constrain(out, "replica", "whole_length", "heads", "head_dim")

            return one

        return self._run(inputs, positions, attend, cache, keep=True, weights_stay=True)

    def _run(
        self,
        inputs: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Callable[[int | None, Any], Attend],
        cache: KeyValues | None = None,
        dropout_key: Array | None = None,
        keep: bool = False,
        weights_stay: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        x = self.embed_tokens(inputs, self.dtype, weights_stay)
        sin, cos = sin_cos(positions, self.arch.rope, self.arch.head_dim)
        graphdef, layers = nnx.split(self.layers)
        windows, which = _windows(self.arch)

        def layer(x, scanned):
            params, place, index, layer_cache = scanned
            branches = [attend(window, layer_cache) for window in windows]

            def attend_here(q: Array, k: Array, v: Array) -> Array:
                return branches[0](q, k, v) if index is None else lax.switch(index, branches, q, k, v)

            x, seen = nnx.merge(graphdef, params)(x, sin, cos, attend_here, place)
            return x, seen if keep else None

        keys = None if dropout_key is None else jax.random.split(dropout_key, self.arch.num_layers)
        places = Place(jnp.arange(self.arch.num_layers, dtype=jnp.float32), keys, weights_stay)
        x, seen = lax.scan(rematerialised(layer, self.remat), x, (layers, places, which, cache))
        return self.norm(x), seen

    def head(self) -> Head:
        """The output projection: the token table where the two are tied."""
        if self.lm_head is None:
            return Head(matrix_of(self.embed_tokens.embedding), vocab_dim=0, dtype=self.dtype)
        return Head(matrix_of(self.lm_head.kernel), vocab_dim=1, dtype=self.dtype)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """All logits at once, float32. For generation and tests; training never materialises them."""
        return self.head().logits(hidden)


def _within(segment_ids: Int[Array, "B T"], kernel: Kernel) -> Callable[[int | None, Any], Attend]:
    return lambda window, _: lambda q, k, v: attention(q, k, v, segment_ids, window, kernel=kernel)


def _windows(arch: Architecture) -> tuple[list[int | None], Array | None]:
    """The distinct sliding windows, and which of them each layer has where there are several: kernels need to know."""
    if arch.sliding_windows is None:
        return [None], None
    distinct = list(dict.fromkeys(arch.sliding_windows))
    if len(distinct) == 1:
        return distinct, None
    return distinct, jnp.asarray([distinct.index(window) for window in arch.sliding_windows], jnp.int32)
