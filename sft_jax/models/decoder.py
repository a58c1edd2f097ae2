"""The decoder: embeddings, stages of layers, a norm, ``lm_head``. Independent of the model family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sft_jax.models.architecture import Architecture
from sft_jax.models.attention.backend import XLA, Backend
from sft_jax.models.block import Block
from sft_jax.models.context import Context
from sft_jax.models.eight_bit import EightBit
from sft_jax.models.head import Head
from sft_jax.models.layers import Embedding, Initializer, Linear, make_norm, without_gradient
from sft_jax.models.per_layer import PerLayerInputs
from sft_jax.models.quantized import in_dtype, matrix_of
from sft_jax.models.remat import rematerialize
from sft_jax.models.rope import sin_cos
from sft_jax.models.stages import Stage, stages_of
from sft_jax.typing import Array, Bool, Float, Int

Cache = dict[str, dict[str, Any]]  # the cache of each mixer of each stack of layers, stacked along the layers


class Decoder(nnx.Module):
    """Computes final hidden states from token ids, and logits from hidden states.

    ``layers`` has one block per stack of layers (:mod:`sft_jax.models.stages`), named by the index of its first layer.
    The parameters of a block have a leading dimension of layers. Compile time grows with the number of distinct layers,
    not with depth.

    Build it under ``nnx.eval_shape`` if weights are read from files: this computes and allocates nothing.
    """

    def __init__(
        self,
        arch: Architecture,
        key: Array,
        dtype: Any = jnp.float32,
        remat: str = "none",
        backend: Backend = XLA,
        compute: EightBit | None = None,
    ):
        make = Initializer(key, arch.initializer_range)
        self.arch, self.dtype, self.remat, self.backend, self.compute = arch, dtype, remat, backend, compute
        self.embed_tokens = Embedding(arch.vocab_size, arch.hidden_size, make, arch.embedding_scale)
        self.embedding_norm = nnx.data(
            None if arch.embedding_norm is None else make_norm(arch.hidden_size, arch.embedding_norm, make)
        )
        self.layers = _Layers(arch, make)
        self.norm = make_norm(arch.hidden_size, arch.norm, make)
        self.lm_head: Linear | None = nnx.data(
            None
            if arch.tie_word_embeddings
            else Linear(arch.hidden_size, arch.vocab_size, ("embed", "vocab"), make, use_bias=arch.lm_head_bias)
        )
        self.embed_positions: Embedding | None = nnx.data(
            Embedding(arch.max_positions, arch.hidden_size, make) if arch.learned_positions else None
        )
        if self.embed_positions is not None:
            self.embed_positions.can_be_quantized = False
        self._per_layer: PerLayerInputs | None = nnx.data(
            None if arch.per_layer is None else PerLayerInputs(arch.per_layer, arch, make)
        )

    def __call__(
        self,
        inputs: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns hidden states after the final norm, in the compute dtype. ``dropout_key`` enables adapter dropout."""
        context = self._context(positions, segment_ids, self.backend, dropout_key=dropout_key)
        return self._run(inputs, context)[0]

    def with_balance(
        self,
        inputs: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """Returns the hidden states of :meth:`__call__` and the routers' load-balancing loss, a mean over layers."""
        context = self._context(positions, segment_ids, self.backend, dropout_key=dropout_key)
        hidden, _, balances = self._run(inputs, context, balance=True)
        assert balances, "a model without experts has no router"
        return hidden, jnp.mean(jnp.concatenate(balances))

    def prefill(
        self, inputs: Int[Array, "B T"], segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Returns the hidden states of :meth:`__call__` and the cache for later tokens.

        Uses the ``xla`` attention backend, because prompts have any length.
        """
        context = self._context(positions, segment_ids, replace(self.backend, name="xla"))
        return self._run(inputs, context, keep_cache=True)[:2]

    def decode(
        self, inputs: Int[Array, "B 1"], positions: Int[Array, "B 1"], cache: Cache
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """Computes one more token per sequence with a cache.

        Weights stay sharded; only attention runs where the sequences are.

        Returns:
            The hidden states, and the entries to write into the cache at ``positions``.
        """
        context = self._context(
            positions, None, self.backend, weight_stationary=True, shared_cache=self._shared_cache(cache)
        )
        return self._run(inputs, context, cache, keep_cache=True)[:2]

    def _context(self, positions: Array, segment_ids: Array | None, backend: Backend, **more: Any) -> Context:
        ropes = {spec.rope: spec.head_dim for spec in self.arch.attention_specs if spec.rope is not None}
        angles = {
            rope: sin_cos(positions, rope, rope.dims or head_dim, segment_ids) for rope, head_dim in ropes.items()
        }
        return Context(positions, segment_ids, angles, backend, compute=self.compute, **more)

    def _shared_cache(self, cache: Cache) -> dict[str, Any]:
        """Returns the cache that readers share, by name: that of the last layer that publishes."""
        return {
            branch.publishes: jax.tree.map(lambda entries: entries[-1], cache[str(stage.first + offset)][branch.name])
            for stage in stages_of(self.arch.layers)
            for offset in range(stage.period)
            for branch in self.arch.layers[stage.first + offset].branches
            if branch.publishes is not None
        }

    def _without_aliases(self, inputs: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Bool[Array, "B T"] | None]:
        """Returns the ids that are read instead, and which positions they are; None if the model has no aliases."""
        aliases = self.arch.aliases
        if not aliases:
            return inputs, None
        is_alias = jnp.isin(inputs, jnp.asarray([token for token, _ in aliases], inputs.dtype))
        for token, read_as in aliases:
            inputs = jnp.where(inputs == token, jnp.int32(read_as), inputs)
        return inputs, is_alias

    def _inputs_of_layers(
        self, inputs: Int[Array, "B T"], is_alias: Array | None, x: Array, context: Context
    ) -> Float[Array, "L B T P"] | None:
        """Returns the inputs of each layer besides the hidden states; None if they have none."""
        if (module := self._per_layer) is None:
            return None
        if (key := context.dropout_key) is not None:
            context = replace(context, dropout_key=jax.random.fold_in(key, self.arch.num_layers))
        compute = rematerialize(lambda x: module(inputs, is_alias, x, context), self.remat, in_scan=False)
        return compute(x)

    def _run(
        self,
        inputs: Int[Array, "B T"],
        context: Context,
        cache: Cache | None = None,
        keep_cache: bool = False,
        balance: bool = False,
    ) -> tuple[Float[Array, "B T D"], Cache, list[Float[Array, "L"]]]:
        """Returns hidden states, new cache entries and the routers' load-balancing losses, both if asked for."""
        inputs, is_alias = self._without_aliases(inputs)
        x = self.embed_tokens(inputs, self.dtype, context.weight_stationary)
        if self.embed_positions is not None:
            x = x + self.embed_positions(context.positions, self.dtype, context.weight_stationary)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        per_layer = self._inputs_of_layers(inputs, is_alias, x, context)
        x = without_gradient(x, is_alias)
        keys = context.dropout_key
        keys = None if keys is None else jax.random.split(keys, self.arch.num_layers)
        new: Cache = {}
        balances: list[Array] = []
        for stage in stages_of(self.arch.layers):
            x, published, stage_cache, stage_balances = self._stage(
                stage, x, context, keys, per_layer, cache, keep_cache, balance
            )
            context = replace(context, shared={**context.shared, **published})
            new |= stage_cache
            balances += stage_balances
        x = self.norm(x)
        x = x if self.arch.logits_scale == 1.0 else x * self.arch.logits_scale
        if self.arch.lm_head_bias:
            x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        return x, new, balances

    def _stage(
        self,
        stage: Stage,
        x: Array,
        context: Context,
        keys: Array | None,
        per_layer: Float[Array, "L B T P"] | None,
        cache: Cache | None,
        keep_cache: bool,
        balance: bool,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any], Cache, list[Float[Array, "L"]]]:
        """Scans over the repeats of a period; each layer is rematerialized by itself.

        Keys and values that its layers publish for others are carried, so that only the last ones stay in memory.

        Returns:
            The hidden states, what was published, the cache entries of the layers, and the losses of their routers.
        """
        names = [str(stage.first + offset) for offset in range(stage.period)]
        graphs, params = zip(*(nnx.split(getattr(self.layers, name)) for name in names), strict=True)
        indices = [jnp.asarray(stage.layers(offset), jnp.float32) for offset in range(stage.period)]
        stage_keys = [
            None if keys is None else keys[jnp.asarray(stage.layers(offset))] for offset in range(stage.period)
        ]
        stage_caches = [None if cache is None else cache[name] for name in names]
        stage_per_layer = [
            None if per_layer is None else per_layer[stage.first + offset : stage.end : stage.period]
            for offset in range(stage.period)
        ]

        def period(carry: tuple[Array, dict[str, Any]], scanned: Any) -> tuple[tuple[Array, dict[str, Any]], list[Any]]:
            x, published = carry
            outputs = []
            for graph, *inputs in zip(graphs, *scanned, strict=True):

                def layer(x: Array, published: Any, inputs: list[Any], graph: Any = graph) -> tuple[Array, Any, Any]:
                    params, index, key, cache, own = inputs
                    shared = {**context.shared, **published}
                    balances: list[Array] | None = [] if balance else None
                    layer_context = replace(
                        context,
                        layer=index,
                        dropout_key=key,
                        cache=cache,
                        per_layer=own,
                        shared=shared,
                        balances=balances,
                    )
                    block = nnx.merge(graph, params)
                    x, new = block(x, layer_context)
                    return x, block.layer.published(new), (new if keep_cache else None, balances or [])

                x, more, output = rematerialize(layer, self.remat)(x, published, inputs)
                published = {**published, **more}
                outputs.append(output)
            return (x, published), outputs

        published = {
            branch.publishes: context.shared.get(branch.publishes) or branch.spec.no_entries(x)
            for layer in self.arch.layers[stage.first : stage.first + stage.period]
            for branch in layer.branches
            if branch.publishes is not None
        }
        scanned = (list(params), indices, stage_keys, stage_caches, stage_per_layer)
        (x, published), outputs = lax.scan(period, (x, published), scanned)
        caches, balances = zip(*outputs, strict=True)
        return x, published, dict(zip(names, caches, strict=True)), [one for layer in balances for one in layer]

    def head(self) -> Head:
        """Returns the output projection: ``lm_head``, or the embeddings if the two are tied."""
        softcap = self.arch.logits_softcap
        if self.lm_head is None:
            return Head(matrix_of(self.embed_tokens.weight), vocab_dim=0, dtype=self.dtype, softcap=softcap)
        matrix = matrix_of(self.lm_head.weight)
        if self.lm_head.bias is not None:
            # The bias is the weight of the ones that _run appends, so that the loss need not know of it.
            bias = self.lm_head.bias[...].astype(self.dtype)
            matrix = jnp.concatenate([in_dtype(matrix, self.dtype), bias[None]])
        return Head(matrix, vocab_dim=1, dtype=self.dtype, softcap=softcap)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Computes all logits in float32. For generation and tests; training never materializes them."""
        return self.head().logits(hidden)


class _Layers(nnx.Module):
    """The blocks of a decoder by the name of their stack, such as ``"0"``."""

    def __init__(self, arch: Architecture, make: Initializer):
        for stage in stages_of(arch.layers):
            for offset in range(stage.period):
                layer = arch.layers[stage.first + offset]
                block = Block(layer, arch, make, (stage.repeats,))
                setattr(self, str(stage.first + offset), block)


def resize_cache(cache: Cache, length: int) -> Cache:
    """Pads a cache to ``length`` positions."""
    return {name: {mixer: entries.resize(length) for mixer, entries in layer.items()} for name, layer in cache.items()}


def update_cache(cache: Cache, new: Cache, positions: Int[Array, "B"]) -> Cache:
    """Writes one token per sequence at its position; in place if the buffer is donated."""
    return {
        name: {mixer: entries.update(new[name][mixer], positions) for mixer, entries in layer.items()}
        for name, layer in cache.items()
    }
