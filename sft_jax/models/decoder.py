"""The decoder: embeddings, stages of layers, a norm, ``lm_head``. It knows no family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sft_jax.models.architecture import Architecture
from sft_jax.models.attention.backend import XLA, Backend
from sft_jax.models.block import PreNormBlock
from sft_jax.models.context import Context
from sft_jax.models.head import Head
from sft_jax.models.layers import Embedding, Initializer, Linear, RMSNorm
from sft_jax.models.quantized import matrix_of
from sft_jax.models.remat import rematerialised
from sft_jax.models.rope import sin_cos
from sft_jax.models.stages import Stage, stages_of
from sft_jax.typing import Array, Float, Int

Cache = dict[str, Any]  # by stack: what its layers' mixers kept, with a leading dimension of layers


class Decoder(nnx.Module):
    """Token ids to final hidden states, and hidden states to logits.

    ``layers`` has a block for each stack of layers (:mod:`sft_jax.models.stages`), called by the number of its first
    layer; all parameters of a block carry a leading dimension of layers. Compile time grows with the number of distinct
    layers, not with depth.

    Build it under ``nnx.eval_shape`` when weights are read from files: nothing is then computed or allocated.
    """

    def __init__(
        self,
        arch: Architecture,
        key: Array,
        dtype: Any = jnp.float32,
        remat: str = "none",
        backend: Backend = XLA,
    ):
        make = Initializer(key, arch.initializer_range)
        self.arch, self.dtype, self.remat, self.backend = arch, dtype, remat, backend
        self.embed_tokens = Embedding(arch.vocab_size, arch.hidden_size, make, arch.embedding_scale)
        self.layers = _Layers(arch, make)
        self.norm = RMSNorm(arch.hidden_size, arch.norm, make)
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
        context = self._context(positions, segment_ids, self.backend, dropout_key=dropout_key)
        return self._run(inputs, context)[0]

    def prefill(
        self, inputs: Int[Array, "B T"], segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """What :meth:`__call__` gives, and the cache that later tokens attend to.

        Prompts have any length, so attention is computed by the ``xla`` backend.
        """
        context = self._context(positions, segment_ids, replace(self.backend, name="xla"))
        return self._run(inputs, context, keep_cache=True)

    def decode(
        self, inputs: Int[Array, "B 1"], positions: Int[Array, "B 1"], cache: Cache
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """One more token a sequence, against a cache.

        Weights that devices share are not gathered: attention alone is computed where the sequences are.

        Returns:
            its hidden states, and what is to be written into the cache at ``positions``.
        """
        context = self._context(positions, None, self.backend, weights_stay=True)
        return self._run(inputs, context, cache, keep_cache=True)

    def _context(self, positions: Array, segment_ids: Array | None, backend: Backend, **more: Any) -> Context:
        ropes = {spec.rope: spec.head_dim for spec in self.arch.attention_specs if spec.rope is not None}
        angles = {rope: sin_cos(positions, rope, head_dim) for rope, head_dim in ropes.items()}
        return Context(positions, segment_ids, angles, backend, **more)

    def _run(
        self, inputs: Int[Array, "B T"], context: Context, cache: Cache | None = None, keep_cache: bool = False
    ) -> tuple[Float[Array, "B T D"], Cache]:
        x = self.embed_tokens(inputs, self.dtype, context.weights_stay)
        keys = context.dropout_key
        keys = None if keys is None else jax.random.split(keys, self.arch.num_layers)
        new: Cache = {}
        for stage in stages_of(self.arch.layers):
            x, of_stage = self._stage(stage, x, context, keys, cache, keep_cache)
            new |= of_stage
        return self.norm(x), new

    def _stage(
        self, stage: Stage, x: Array, context: Context, keys: Array | None, cache: Cache | None, keep_cache: bool
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The repeats of a period, scanned over; layers are rematerialised one by one."""
        names = [str(stage.first + place) for place in range(stage.period)]
        graphs, params = zip(*(nnx.split(getattr(self.layers, name)) for name in names), strict=True)
        numbers = [jnp.asarray(stage.layers(place), jnp.float32) for place in range(stage.period)]
        of_keys = [None if keys is None else keys[jnp.asarray(stage.layers(place))] for place in range(stage.period)]
        of_caches = [None if cache is None else cache[name] for name in names]

        def period(x: Array, scanned: Any) -> tuple[Array, list[Any]]:
            kept = []
            for graph, *given in zip(graphs, *scanned, strict=True):

                def layer(x: Array, given: list[Any], graph: Any = graph) -> tuple[Array, Any]:
                    params, number, key, cache = given
                    here = replace(context, layer=number, dropout_key=key, cache=cache)
                    x, new = nnx.merge(graph, params)(x, here)
                    return x, new if keep_cache else None

                x, new = rematerialised(layer, self.remat)(x, given)
                kept.append(new)
            return x, kept

        x, kept = lax.scan(period, x, (list(params), numbers, of_keys, of_caches))
        return x, dict(zip(names, kept, strict=True))

    def head(self) -> Head:
        """The output projection: the embeddings where the two are tied."""
        softcap = self.arch.logits_softcap
        if self.lm_head is None:
            return Head(matrix_of(self.embed_tokens.weight), vocab_dim=0, dtype=self.dtype, softcap=softcap)
        return Head(matrix_of(self.lm_head.weight), vocab_dim=1, dtype=self.dtype, softcap=softcap)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """All logits at once, float32. For generation and tests; training never materialises them."""
        return self.head().logits(hidden)


class _Layers(nnx.Module):
    """The blocks of a decoder by the name of their stack: ``"0"`` and so on."""

    def __init__(self, arch: Architecture, make: Initializer):
        for stage in stages_of(arch.layers):
            for place in range(stage.period):
                layer = arch.layers[stage.first + place]
                block = (layer.block or PreNormBlock)(layer, arch, make, (stage.repeats,))
                setattr(self, str(stage.first + place), block)


def grown(cache: Mapping[str, Any], num_slots: int) -> Cache:
    """A cache with room for ``num_slots`` positions."""
    return {name: one.grown(num_slots) for name, one in cache.items()}


def written(cache: Mapping[str, Any], new: Mapping[str, Any], positions: Int[Array, "B"]) -> Cache:
    """A cache with one token a sequence written at its position; in place where the buffer is donated."""
    return {name: one.written(new[name], positions) for name, one in cache.items()}
