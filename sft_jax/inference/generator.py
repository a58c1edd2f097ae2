"""Batched generation with a key/value cache, one compiled program per bucket of shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sft_jax.distributed.processes import fetch
from sft_jax.errors import UserError
from sft_jax.inference.sampling import Sampling, sample
from sft_jax.models.compiler import compiler_options
from sft_jax.models.decoder import Cache, resize_cache, update_cache
from sft_jax.models.split import Split
from sft_jax.sharding import constrain
from sft_jax.tree import Params
from sft_jax.typing import Array, Bool, Int

_SMALLEST_BUCKET = 16


@dataclass(frozen=True)
class Generated:
    """The answer to one prompt."""

    ids: list[int]  # without the stop token
    stopped: bool  # at a stop token; otherwise at the length limit

    @property
    def finish_reason(self) -> str:
        """``stop`` or ``length``."""
        return "stop" if self.stopped else "length"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """The state of a batch during generation."""

    cache: Cache  # [L, B, S, K, H]
    token: Int[Array, "B"]  # last sampled token, not yet in the cache
    position: Int[Array, "B"]  # position of that token
    done: Bool[Array, "B"]
    tokens: Int[Array, "B S"]  # sampled tokens in order, including stop tokens
    num_tokens: Int[Array, ""]
    finite: Bool[Array, "B"]  # whether all logits that were sampled from are numbers


class Generator:
    """Generates answers with a model.

    Args:
        split: the abstract model.
        stop_ids: stop token ids; any of them ends an answer.
    """

    def __init__(self, split: Split, stop_ids: Sequence[int]):
        self._max_positions = split.arch.max_positions  # context length: prompt and answer together
        self._stop_ids = tuple(sorted(set(stop_ids)))
        self._mesh = mesh = split.mesh
        self._shards = mesh.shape["data"] * mesh.shape["fsdp"]
        stops = np.asarray(self._stop_ids, np.int32)

        def draw(logits: Array, state: _State, keys: Array, sampling: tuple[Array, Array, Array]) -> _State:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, state.num_tokens))(keys)
            token = jnp.where(state.done, state.token, sample(logits, keys, *sampling))
            return _State(
                cache=state.cache,
                token=token,
                position=jnp.where(state.done, state.position, state.position + 1),
                done=state.done | jnp.isin(token, stops),
                tokens=state.tokens.at[:, state.num_tokens].set(token),
                num_tokens=state.num_tokens + 1,
                finite=state.finite & (state.done | jnp.isfinite(jnp.max(logits, axis=-1))),
            )

        def start(
            trainable: Params, frozen: Params, ids: Array, lengths: Array, keys: Array, sampling, cache_length: int
        ):
            model = split.merge(trainable, frozen)
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
            segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
            hidden, cache = model.prefill(constrain(ids, "batch", "length"), segment_ids, positions)
            last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
            state = _State(
                cache=resize_cache(cache, cache_length),
                token=jnp.zeros_like(lengths),
                position=lengths - 1,
                done=lengths == 0,  # padding of the batch
                tokens=jnp.zeros((ids.shape[0], cache_length), jnp.int32),
                num_tokens=jnp.zeros((), jnp.int32),
                finite=jnp.ones(lengths.shape, bool),
            )
            return draw(model.logits(last)[:, 0], state, keys, sampling)

        def decode(trainable: Params, frozen: Params, state: _State, limit: Array, keys: Array, sampling) -> _State:
            model = split.merge(trainable, frozen)

            def body(state: _State) -> _State:
                hidden, new = model.decode(state.token[:, None], state.position[:, None], state.cache)
                state = dataclasses.replace(state, cache=update_cache(state.cache, new, state.position))
                logits = constrain(model.logits(hidden)[:, 0], "batch", "activation")
                return draw(logits, state, keys, sampling)

            return lax.while_loop(lambda s: (s.num_tokens < limit) & ~jnp.all(s.done), body, state)

        options = compiler_options(split)
        self._start = jax.jit(start, static_argnames="cache_length", compiler_options=options)
        self._decode = jax.jit(decode, donate_argnums=2)  # all-gathers no weights, so it needs no compiler options

    def __call__(
        self,
        trainable: Params,
        frozen: Params,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        batch_size: int = 16,
        progress: Callable[[int], object] = lambda prompts: None,
    ) -> list[Generated]:
        """Generates an answer to each prompt, in the order of the prompts.

        An answer does not depend on the other prompts, also with sampling.

        Args:
            prompts: token ids; no prompt is empty.
            max_new_tokens: the length limit of an answer, which also ends with the context.
            progress: called with the number of prompts finished since the last call.

        Raises:
            UserError: a prompt is empty, or leaves no room for an answer in the context; logits are not finite.
        """
        sampling = sampling or Sampling()
        for i, prompt in enumerate(prompts):
            self._check(f"prompt {i + 1}", len(prompt))
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: dict[int, Generated] = {}
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            size = min(batch_size, len(prompts))  # the last batch is padded, so that it needs no new program
            batch = [prompts[i] for i in members]
            state, limit, keys = self._begin(trainable, frozen, batch, members, size, max_new_tokens, sampling)
            with jax.set_mesh(self._mesh):
                state = self._decode(trainable, frozen, state, jnp.int32(limit), keys, sampling.numbers)
            tokens, finite = fetch((state.tokens[:, :limit], state.finite))
            for row, i in enumerate(members):
                _check_finite(finite[row], f"prompt {i + 1}")
                room = min(limit, self._max_positions - len(prompts[i]))
                answers[i] = self._answer(tokens[row, :room].tolist())
            progress(len(members))
        return [answers[i] for i in range(len(prompts))]

    def stream(
        self,
        trainable: Params,
        frozen: Params,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> Iterator[int]:
        """Yields the tokens of one answer as they are generated; a stop token is the last one.

        Raises:
            UserError: as :meth:`__call__`.
        """
        sampling = sampling or Sampling()
        self._check("the prompt", len(prompt))
        state, limit, keys = self._begin(trainable, frozen, [prompt], [0], 1, max_new_tokens, sampling)
        for step in range(limit):
            if step:
                with jax.set_mesh(self._mesh):
                    state = self._decode(trainable, frozen, state, jnp.int32(step + 1), keys, sampling.numbers)
            token = int(state.token[0])
            _check_finite(state.finite[0], "the prompt")
            yield token
            if token in self._stop_ids:
                return

    def _check(self, name: str, length: int) -> None:
        if length == 0:
            raise UserError(f"{name} is empty")
        if length >= self._max_positions:
            raise UserError(
                f"{name} has {length} tokens; the model's context has {self._max_positions}, and an answer needs room"
            )

    def _begin(
        self,
        trainable: Params,
        frozen: Params,
        prompts: Sequence[Sequence[int]],
        indices: Sequence[int],
        batch_size: int,
        max_new_tokens: int,
        sampling: Sampling,
    ) -> tuple[_State, int, Array]:
        """Prefills a batch and samples the first token; returns the state, the token limit and one key per prompt."""
        longest = max(map(len, prompts))
        limit = min(max_new_tokens, self._max_positions - min(map(len, prompts)))
        length = _bucket(longest)
        cache_length = max(length, _bucket(longest + limit))
        rows = _bucket(batch_size, 1)
        rows += -rows % self._shards
        ids, lengths, numbers = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for row, (prompt, index) in enumerate(zip(prompts, indices, strict=True)):
            ids[row, : len(prompt)], lengths[row], numbers[row] = prompt, len(prompt), index
        key = jax.random.key(sampling.seed)
        keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.asarray(numbers))
        with jax.set_mesh(self._mesh):
            state = self._start(trainable, frozen, ids, lengths, keys, sampling.numbers, cache_length=cache_length)
        return state, limit, keys

    def _answer(self, tokens: list[int]) -> Generated:
        for i, token in enumerate(tokens):
            if token in self._stop_ids:
                return Generated(tokens[:i], stopped=True)
        return Generated(tokens, stopped=False)


def _check_finite(finite: Array | np.ndarray, name: str) -> None:
    if not finite:
        raise UserError(
            f"{name}: the model's logits are not finite (NaN or infinite), so there is no answer; its weights are "
            "damaged, or too large for their dtype (try --dtype float32)"
        )


def _bucket(size: int, smallest: int = _SMALLEST_BUCKET) -> int:
    """Rounds up to a power of two, to limit the number of compiled programs."""
    return max(smallest, 1 << (size - 1).bit_length())
