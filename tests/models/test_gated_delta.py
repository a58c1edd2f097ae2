"""The gated delta rule against its recurrence token by token; packed, padded, cached; and its module."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sft_jax.models.attention.backend import XLA
from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer
from sft_jax.models.recurrent.delta import gated_delta, gated_delta_step
from sft_jax.models.recurrent.gated_delta import GatedDeltaSpec
from sft_jax.models.recurrent.triangular import unit_lower_inverse
from sft_jax.models.remat import rematerialize
from sft_jax.models.work import Work

pytestmark = pytest.mark.smoke


def token_by_token(q, k, v, log_decay, beta, segment_ids):
    """The definition; the state starts at zero in each segment, and padding leaves it as it is."""
    before = jnp.pad(segment_ids, [(0, 0), (1, 0)])[:, :-1]
    shape = (*v.shape[:1], *v.shape[2:3], k.shape[3], v.shape[3])

    def step(state, token):
        q, k, v, log_decay, beta, segment, before = token
        kept = jnp.where((segment == before)[:, None, None, None], state, 0.0)
        out, new = gated_delta_step(q, k, v, log_decay, beta, kept)
        return jnp.where((segment > 0)[:, None, None, None], new, state), out

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, log_decay, beta, segment_ids, before))
    state, out = jax.lax.scan(step, jnp.zeros(shape), tokens)
    return jnp.moveaxis(out, 0, 1), state


def random_inputs(rows, heads=(2, 4), dims=(8, 6), seed=0):
    """Inputs of rows given as lengths of their documents; what is left is padding. Decays are weak and strong."""
    rng = np.random.default_rng(seed)
    length = max(map(sum, rows))
    segments = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        segments[i, : sum(row)] = np.repeat(np.arange(1, len(row) + 1), row)
    q, k, v = (
        rng.normal(size=(len(rows), length, *each)) for each in zip((heads[0], *heads), (dims[0], *dims), strict=True)
    )
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    log_decay = -np.exp(rng.normal(size=v.shape[:3]) * 2 - 1)
    beta = rng.uniform(0, 2, v.shape[:3])
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v, log_decay, beta)], jnp.asarray(segments)


def outputs_and_grads(function, inputs, segments):
    """Outputs of real tokens, the state, and the gradients of a function of both."""
    real = (segments > 0)[..., None, None]

    def total(*inputs):
        out, state = function(*inputs, segments)
        out = jnp.where(real, out, 0.0)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state)), (out, state)

    (_, outs), grads = jax.jit(jax.value_and_grad(total, range(5), has_aux=True))(*inputs)
    return *outs, *grads


ROWS = [[40, 1, 70, 39], [99, 1]]


@pytest.mark.parametrize("chunk", [1, 8, 32, 64])
def test_chunks_are_the_recurrence(chunk):
    inputs, segments = random_inputs(ROWS)
    ours = outputs_and_grads(lambda *given: gated_delta(*given, chunk=chunk), inputs, segments)
    for one, other in zip(ours, outputs_and_grads(token_by_token, inputs, segments), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


def test_groups_of_chunks():
    """Twenty chunks are two groups; the second continues the state of the first."""
    inputs, segments = random_inputs([[13, 60, 5]], heads=(1, 2))
    ours = outputs_and_grads(lambda *given: gated_delta(*given, chunk=4), inputs, segments)
    for one, other in zip(ours, outputs_and_grads(token_by_token, inputs, segments), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


def test_packed_documents_are_as_apart():
    """Values and the gradients of every input; the state is that of the last document."""
    inputs, segments = random_inputs([ROWS[0]])
    out, state, *grads = outputs_and_grads(gated_delta, inputs, segments)
    no_grad_of_state = lambda *given: (gated_delta(*given)[0], jnp.zeros(()))  # noqa: E731
    start = 0
    for length in ROWS[0]:
        apart = [x[:, start : start + length] for x in inputs]
        ones = jnp.ones((1, length), jnp.int32)
        is_last = start + length == segments.shape[1]
        expected, last, *expected_grads = outputs_and_grads(gated_delta if is_last else no_grad_of_state, apart, ones)
        if is_last:
            np.testing.assert_allclose(state, last, atol=1e-5, rtol=0)
        for one, other in zip([out, *grads], [expected, *expected_grads], strict=True):
            np.testing.assert_allclose(one[:, start : start + length], other, atol=1e-5, rtol=1e-5)
        start += length


def test_example():
    ones, log_decay, beta = jnp.ones((1, 3, 1, 1)), jnp.zeros((1, 3, 1)), jnp.full((1, 3, 1), 0.5)
    out, state = gated_delta(ones, ones, 4 * ones, log_decay, beta, jnp.asarray([[1, 1, 2]]))
    np.testing.assert_allclose(out.ravel(), [2, 3, 2])
    np.testing.assert_allclose(state.ravel(), [2])


def test_equal_keys():
    """A repeated token: a product of powers of the triangular matrix would have no correct digit."""
    (q, k, v, _, _), segments = random_inputs([[128]], heads=(1, 1))
    k, beta = jnp.broadcast_to(k[:, :1], k.shape), jnp.full(v.shape[:3], 1.9)
    inputs = [q, k, v, jnp.zeros(v.shape[:3]), beta]
    for one, other in zip(gated_delta(*inputs, segments), token_by_token(*inputs, segments), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_inverse(size):
    a = np.tril(np.random.default_rng(0).normal(size=(3, size, size)) * 0.3, -1)
    exact = np.linalg.inv(np.eye(size) + a)
    np.testing.assert_allclose(unit_lower_inverse(jnp.asarray(a, jnp.float32)), exact, atol=1e-5 * np.abs(exact).max())


def test_strong_decay_in_bfloat16():
    (q, k, v, log_decay, beta), segments = random_inputs([[70, 10], [50]])
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    log_decay = jnp.where(jnp.arange(80)[:, None] % 3 == 0, -1e4, log_decay)

    def total(*inputs):
        out, state = gated_delta(*inputs, segments)
        assert out.dtype == jnp.bfloat16
        assert state.dtype == jnp.float32
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(state)

    grads = jax.jit(jax.grad(total, range(5)))(q, k, v, log_decay, beta)
    assert all(bool(jnp.all(jnp.isfinite(grad))) for grad in grads)
    assert float(jnp.abs(grads[3]).max()) > 0


# -- the module -------------------------------------------------------------------------------------------------------

PROJECTIONS = (("in_proj_qkv", "qkv"), ("in_proj_z", "z"), ("in_proj_b", "b"), ("in_proj_a", "a"))
SPLIT = GatedDeltaSpec(2, 6, 8, 5, 4, PROJECTIONS, max_beta=2.0)


def make_module(spec=SPLIT):
    """A module of one layer with large weights, without the leading dimension."""
    return spec.module(12, Initializer(jax.random.key(0), 0.5), ())


def run(module, x, segments, positions, cache=None):
    """Output and state; ``segments`` is None for a token after those in ``cache``."""
    graph, params = nnx.split(module)

    @jax.jit
    def compiled(params, x, segments, positions, cache):
        return nnx.merge(graph, params)(x, Context(positions, segments, {}, XLA, cache=cache))

    segments, positions = jax.tree.map(jnp.asarray, (segments, positions))
    return compiled(params, x, segments, positions, cache)


def test_decoding_is_the_full_pass():
    """Prompts of two lengths in one padded batch, then token by token."""
    module, lengths, total = make_module(), (9, 2), 14
    x = jax.random.normal(jax.random.key(1), (2, total, 12))
    places = np.broadcast_to(np.arange(total), (2, total))
    full, _ = run(module, x, np.ones((2, total), np.int32), places)
    prompt = places[:, :9]
    segments = (prompt < np.asarray(lengths)[:, None]).astype(np.int32)
    out, state = run(module, x[:, :9], segments, prompt)
    np.testing.assert_allclose(out[1, :2], full[1, :2], atol=1e-5)
    rows = np.arange(2)
    for step in range(3):
        at = np.asarray(lengths) + step
        out, state = run(module, x[rows, at][:, None], None, at[:, None], state)
        np.testing.assert_allclose(out[:, 0], full[rows, at], atol=1e-5)


def test_packed_in_the_module():
    """The convolution, too, stays within a document."""
    module, lengths = make_module(), (7, 2, 12)
    x = jax.random.normal(jax.random.key(1), (1, sum(lengths), 12))
    segments = np.repeat(np.arange(1, 4, dtype=np.int32), lengths)[None]
    places = np.concatenate([np.arange(length) for length in lengths])[None]
    packed, _ = run(module, x, segments, places)
    start = 0
    for length in lengths:
        one = slice(start, start + length)
        apart, _ = run(module, x[:, one], np.ones((1, length), np.int32), places[:, one])
        np.testing.assert_allclose(packed[:, one], apart, atol=1e-5)
        start += length


def test_grouped_projections():
    """Outputs by key head, as in Qwen3-Next, are a permutation of the outputs by part."""
    grouped = replace(SPLIT, projections=(("qkvz", "qkvz"), ("ba", "ba")), grouped=True)
    ours, other = make_module(), make_module(grouped)
    parts = dict(zip("qkv", jnp.split(ours.in_proj_qkv.weight[...], [16, 32], axis=1), strict=True))
    parts |= {"z": ours.in_proj_z.weight[...], "b": ours.in_proj_b.weight[...], "a": ours.in_proj_a.weight[...]}
    for name in ("qkvz", "ba"):
        of_heads = [parts[part].reshape(12, 2, -1) for part in name]
        getattr(other, name).weight[...] = jnp.concatenate(of_heads, axis=-1).reshape(12, -1)
    for path in ("conv1d", "norm", "out_proj"):
        getattr(other, path).weight[...] = getattr(ours, path).weight[...]
    x = jax.random.normal(jax.random.key(1), (1, 10, 12))
    where = (np.ones((1, 10), np.int32), np.arange(10)[None])
    # Products sum in another order, on outputs of order ten.
    np.testing.assert_allclose(run(other, x, *where)[0], run(ours, x, *where)[0], atol=1e-5)


def test_rematerialization():
    """All policies give the same gradients."""
    graph, params = nnx.split(make_module())
    x = jax.random.normal(jax.random.key(1), (1, 24, 12))
    segments = jnp.repeat(jnp.arange(1, 3), 12)[None]
    context = Context(jnp.tile(jnp.arange(12), 2)[None], segments, {}, XLA)

    def grads(policy):
        layer = rematerialize(lambda params, x: nnx.merge(graph, params)(x, context)[0], policy)
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(layer(params, x)))))(params)

    expected = grads("none")
    for policy in ("full", "dots"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads(policy), expected)


def test_flops_by_hand():
    """Three times two operations for each element of the state of six heads; backward is twice that."""
    assert make_module().mixing_flops(Work(tokens=10, targets=1, squares=1e9)) == 3 * (10 * 6 * 3 * 2 * 8 * 5)
