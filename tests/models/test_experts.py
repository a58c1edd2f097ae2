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
from sft_jax.models.moe import blocks, dispatch, pallas
from sft_jax.models.moe.describe import expected_parts
from sft_jax.models.moe.experts import ExpertsSpec
from sft_jax.models.moe.grouped import adapted_dot, grouped_dot
from sft_jax.models.moe.mixture import MixtureSpec
from sft_jax.models.moe.router import RouterSpec
from sft_jax.sharding import make_mesh, named_sharding

EXPERTS, DIM, SIZE = 8, 16, 24


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.mark.parametrize("sizes", [[40, 0, 3, 77, 0], [0, 0, 0, 0, 0], [120, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize(("module", "inputs", "outputs"), [(blocks, 12, 20), (pallas, 140, 130), (pallas, 72, 900)])
def test_groups_are_multiplied_by_their_matrix(module, inputs, outputs, sizes, monkeypatch):
    """The loop over blocks, and the kernels of TPUs with several tiles in each dimension, some of them cut off."""
    monkeypatch.setattr(pallas, "_MOST_INPUTS", 100)
    x, y, weights = normal(0, 300, inputs), normal(1, 300, outputs), normal(2, 5, inputs, outputs)
    x_a, b, sized = normal(3, 300, 3), normal(4, 5, 3, outputs), jnp.asarray(sizes, jnp.int32)
    used, expert = sum(sizes), np.repeat(np.arange(5), sizes)
    options = {"interpret": True} if module is pallas else {}
    product = jnp.einsum("mi,mio->mo", x[:used], weights[expert])
    added = product + jnp.einsum("mi,mio->mo", x_a[:used], b[expert])
    of_groups = [np.asarray(x[:used][expert == i]).T @ np.asarray(y[:used][expert == i]) for i in range(5)]
    for ours, theirs in (
        (module.dot(x, weights, sized, **options)[:used], product),
        (module.dot(x, jnp.swapaxes(weights, 1, 2), sized, transposed=True, **options)[:used], product),
        (module.dot(x, weights, sized, more=(x_a, b), **options)[:used], added),
        (module.outer(x, y, sized, jnp.float32, **options), np.stack(of_groups)),
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("adapted", [True, False])
def test_gradients_of_grouped_products(adapted):
    sizes, expert = jnp.asarray([7, 0, 13], jnp.int32), np.repeat(np.arange(3), [7, 0, 13])
    x, weights, a, b = normal(0, 20, 6), normal(1, 3, 6, 9), normal(2, 3, 6, 2), normal(3, 3, 2, 9)

    def ours(x, weights, a, b):
        return adapted_dot(x, weights, a, b, sizes, 0.5) if adapted else grouped_dot(x, weights, sizes)

    def dense(x, weights, a, b):
        merged = weights + 0.5 * a @ b if adapted else weights
        return jnp.einsum("mi,mio->mo", x, merged[expert])

    (out, back), (expected, expected_back) = (jax.vjp(one, x, weights, a, b) for one in (ours, dense))
    np.testing.assert_allclose(out, expected, atol=1e-4)
    for one, other in zip(back(normal(4, 20, 9)), expected_back(normal(4, 20, 9)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


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


def test_expected_parts_are_one_more_than_for_even_rows(monkeypatch):
    """Each token has two rows."""
    monkeypatch.setattr(dispatch, "_FEWEST_ROWS", 5)
    mixture = nnx.merge(*make(False))
    assert expected_parts(mixture, 24, tensor=1) == 48 // 24 + 1
    assert expected_parts(mixture, 24, tensor=4) == 12 // 6 + 1
    assert expected_parts(mixture, 2, tensor=2) == 1
    assert expected_parts(mixture.gate, 24, tensor=1) == 1  # no experts in it


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
