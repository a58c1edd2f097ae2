"""The Mamba-2 mixer and the short convolution: packing, prefill of padded prompts, decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sft_jax.models.architecture import Norm
from sft_jax.models.attention.backend import XLA
from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer
from sft_jax.models.recurrent.mamba2 import Mamba2Spec
from sft_jax.models.recurrent.short_conv import ShortConvSpec
from sft_jax.sharding import make_mesh

pytestmark = pytest.mark.smoke

D, T = 24, 20
SPECS = {
    "mamba2": Mamba2Spec(8, 6, 2, 5, Norm(1e-5)),
    "mamba2-scaled": Mamba2Spec(
        4,
        6,
        1,
        7,
        Norm(1e-5),
        norm_before_gate=True,
        conv_size=3,
        in_bias=True,
        out_bias=True,
        time_step_limit=(0.01, 0.05),
        scales=(0.9, 0.8, 1.1, 1.2, 0.7),
    ),
    "mamba2-without-norm": Mamba2Spec(2, 12, 1, 7, None, conv_bias=False),
    "short-conv": ShortConvSpec(3),
    "short-conv-bias": ShortConvSpec(4, bias=True),
}


def make(spec):
    """The mixer with random parameters."""
    mixer = spec.module(D, Initializer(jax.random.key(0), 0.3), ())
    keys = nnx.Rngs(1)
    for _, leaf in nnx.iter_graph(mixer):
        if isinstance(leaf, nnx.Param):
            leaf[...] = leaf[...] + 0.2 * jax.random.normal(keys(), leaf.shape)
    return mixer


def run(mixer, x, positions, segment_ids=None, cache=None):
    return mixer(x, Context(positions, segment_ids, {}, XLA, cache=cache))


def packed(*lengths):
    """Positions and segment ids of one sequence of ``T`` tokens."""
    positions, ids = np.zeros((2, 1, T), np.int32)
    for i, (start, length) in enumerate(zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True)):
        positions[0, start : start + length] = np.arange(length)
        ids[0, start : start + length] = i + 1
    return positions, ids


def inputs(num_sequences):
    return jax.random.normal(jax.random.key(2), (num_sequences, T, D))


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)


@pytest.mark.parametrize("name", SPECS)
def test_packed_documents_match_each_by_itself(name):
    """Outputs, and gradients with respect to the input and all parameters."""
    graph, params = nnx.split(make(SPECS[name]))
    x, lengths = inputs(1), [5, 1, 12]

    @jax.jit
    def grads_and_out(params, x, positions, ids):
        def total(params, x):
            out = jnp.where(ids[..., None] > 0, run(nnx.merge(graph, params), x, positions, ids)[0], 0.0)
            return jnp.sum(jnp.sin(out)), out

        return jax.grad(total, (0, 1), has_aux=True)(params, x)

    (d_params, d_x), out = grads_and_out(params, x, *packed(*lengths))
    assert not np.any(d_x[:, sum(lengths) :])
    alone = []
    for start, length in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
        own_x = jnp.roll(x, -start, axis=1)
        (d_own_params, d_own_x), own = grads_and_out(params, own_x, *packed(length))
        here = slice(start, start + length)
        assert_close((own[:, :length], d_own_x[:, :length]), (out[:, here], d_x[:, here]))
        alone.append(d_own_params)
    assert_close(jax.tree.map(lambda *grads: sum(grads[1:], grads[0]), *alone), d_params)


@pytest.mark.parametrize("name", SPECS)
def test_decoding_after_a_padded_prompt_matches_the_full_pass(name):
    graph, params = nnx.split(make(SPECS[name]))
    f = jax.jit(lambda *inputs: run(nnx.merge(graph, params), *inputs))
    x, prompts, rows = inputs(3), jnp.asarray([1, 2, T - 3]), jnp.arange(3)
    time = jnp.broadcast_to(jnp.arange(T), (3, T))
    full, last = f(x, time, jnp.ones_like(time))
    is_prompt = time < prompts[:, None]
    out, state = f(jnp.where(is_prompt[..., None], x, 9.0), jnp.where(is_prompt, time, 0), is_prompt.astype(jnp.int32))
    assert_close(out[is_prompt], full[is_prompt])
    for step in range(3):
        at = prompts + step
        out, new = f(x[rows, at][:, None], at[:, None], None, state)
        state = state.update(new, at)
        assert_close(out[:, 0], full[rows, at])
    # The third sequence is at its end now.
    assert_close(jax.tree.map(lambda one: one[2], state), jax.tree.map(lambda one: one[2], last))


@pytest.mark.parametrize("name", ["mamba2-scaled", "short-conv-bias"])
def test_bfloat16(name):
    """Outputs and gradients have the compute dtype; the memory is float32."""
    graph, params = nnx.split(make(SPECS[name]))

    def total(params, x):
        out, state = run(nnx.merge(graph, params), x, *packed(7, 9))
        return jnp.sum(out.astype(jnp.float32)), (out, state)

    grads, (out, state) = jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, inputs(1).astype(jnp.bfloat16))
    assert out.dtype == grads[1].dtype == state.inputs.dtype == jnp.bfloat16
    assert state.memory is None or state.memory.dtype == jnp.float32
    assert all(np.all(np.isfinite(np.asarray(one, np.float32))) for one in jax.tree.leaves((out, grads)))


def test_sharded_over_sequences_lengths_and_heads():
    graph, params = nnx.split(make(SPECS["mamba2"]))
    f = jax.jit(lambda *inputs: run(nnx.merge(graph, params), *inputs))
    x, time = inputs(2), jnp.broadcast_to(jnp.arange(T), (2, T))
    expected = f(x, time, jnp.ones_like(time))
    with jax.set_mesh(make_mesh(data=1, fsdp=2, sequence=2, tensor=2)):
        assert_close(f(x, time, jnp.ones_like(time)), expected)
