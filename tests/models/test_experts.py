"""Products of experts against dense ones, and experts on a mesh against those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sft_jax.adapters.lora import LoRA
from sft_jax.models.attention.backend import XLA
from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer
from sft_jax.models.moe import dispatch
from sft_jax.models.moe.experts import ExpertsSpec
from sft_jax.models.moe.grouped import blocked_dot, megablox_dot
from sft_jax.models.moe.mixture import MixtureSpec
from sft_jax.models.moe.router import RouterSpec
from sft_jax.sharding import make_mesh, named_sharding

EXPERTS, DIM, SIZE = 8, 16, 24


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.mark.parametrize("sizes", [[40, 0, 3, 77, 0], [0, 0, 0, 0, 0], [120, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("product", ["blocks", "megablox"])
def test_groups_are_multiplied_by_their_matrix(sizes, product):
    inputs, outputs = (128, 128) if product == "megablox" else (12, 20)
    x, weights = normal(0, 120, inputs), normal(1, 5, inputs, outputs)
    d_out = normal(2, 120, outputs)
    used, expert = sum(sizes), np.repeat(np.arange(5), sizes)

    def dense(x, weights):
        return jnp.einsum("mi,mio->mo", x[:used], weights[expert])

    def grouped(x, weights):
        sized = jnp.asarray(sizes, jnp.int32)
        out = blocked_dot(x, weights, sized) if product == "blocks" else megablox_dot(x, weights, sized, interpret=True)
        return out[:used]

    for ours, theirs in zip(
        jax.vjp(grouped, x, weights)[1](d_out[:used]), jax.vjp(dense, x, weights)[1](d_out[:used]), strict=True
    ):
        np.testing.assert_allclose(ours[:used] if ours.ndim == 2 else ours, theirs[: used or None][: len(ours)]
                                   if ours.ndim == 3 else theirs[:used], atol=1e-4)  # fmt: skip
    np.testing.assert_allclose(grouped(x, weights), dense(x, weights), atol=1e-4)


def make(adapted):
    """A mixture with random weights."""
    spec = MixtureSpec(RouterSpec(EXPERTS, 2, "sigmoid"), ExpertsSpec(SIZE, use_bias=True))

    def network():
        mixture = spec.module(DIM, Initializer(jax.random.key(0), 0.3), ())
        for layer in (mixture.experts.gate_up_proj, mixture.experts.down_proj) if adapted else ():
            LoRA(2, 4.0).attach(layer)
        return mixture

    mixture = network()
    graph, state = nnx.split(mixture)
    leaves, tree = jax.tree.flatten(state)
    leaves = [0.3 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
    mixture = nnx.merge(graph, tree.unflatten(leaves))
    return nnx.split(mixture)


def context(**more):
    zeros = jnp.zeros((1, 1), jnp.int32)
    return Context(zeros, zeros, {}, XLA, **more)


@pytest.mark.parametrize("moves", [True, False], ids=["tokens", "weights"])
@pytest.mark.parametrize(
    "mesh",
    [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"data": 2, "sequence": 2}, {"tensor": 4}, {"fsdp": 2, "sequence": 2}],
    ids=str,
)
@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
def test_experts_on_a_mesh_are_those_of_one_device(adapted, mesh, moves, monkeypatch):
    monkeypatch.setattr(dispatch, "moves_tokens", lambda *_: moves)
    monkeypatch.setattr(dispatch, "_FEWEST_ROWS", 5)  # several parts, and some that have no row
    graph, state = make(adapted)
    x, d_out = normal(90, 4, 6, DIM), normal(91, 4, 6, DIM)

    def run(state, x):
        return nnx.merge(graph, state)(x, context())

    out, transpose = jax.vjp(run, state, x)
    expected = (out, *transpose(d_out))
    made = make_mesh(**({"fsdp": 1} | mesh), devices=jax.devices()[:4])
    shard = lambda leaf: jax.device_put(  # noqa: E731
        leaf[...], named_sharding(made, leaf.get_metadata("axes"), leaf.shape)
    )
    sharded = jax.tree.map(lambda leaf: leaf.replace(shard(leaf)), state, is_leaf=lambda n: isinstance(n, nnx.Variable))
    with jax.set_mesh(made):
        out, d_state, d_x = jax.jit(lambda s, x, d: (run(s, x), *jax.vjp(run, s, x)[1](d)))(sharded, x, d_out)
        stationary = jax.jit(lambda s, x: nnx.merge(graph, s)(x, context(weight_stationary=True)))(sharded, x)
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(stationary, expected[0], atol=1e-5)
    np.testing.assert_allclose(d_x, expected[2], atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(d_state), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
