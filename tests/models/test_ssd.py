"""The recurrence of Mamba-2 in chunks, against one token at a time; values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sft_jax.models.recurrent.ssd import ssd, ssd_step

pytestmark = pytest.mark.smoke

N, H, G, S = 4, 3, 2, 5
ROWS = [[11, 19, 3], [1, 1, 27], [33]]  # lengths of documents; what is left of the longest row is padding


def segments_of(rows):
    length = max(map(sum, rows))
    ids = [np.repeat(np.arange(1, len(row) + 1), row) for row in rows]
    return jnp.asarray([np.pad(one, (0, length - len(one))) for one in ids], jnp.int32)


def random_inputs(shape, decay=1.0, dtype=jnp.float32):
    """x, log_decay, b, c; the strength of the decay differs between tokens by orders of magnitude."""
    rng = np.random.default_rng(0)
    x, b, c = (rng.normal(size=(*shape, *dims)) / 2 for dims in ((N, H), (G, S), (G, S)))
    log_decay = -decay * 10.0 ** rng.uniform(-3, 1, size=(*shape, N))
    return [jnp.asarray(one, dtype) for one in (x, log_decay, b, c)]


def one_by_one(x, log_decay, b, c, segment_ids):
    """A memory that is zero where a segment begins and stays as it is at padding."""

    def step(carry, token):
        memory, before = carry
        *inputs, segment = token
        kept = jnp.where((segment == before)[:, None, None, None], memory, 0.0)
        out, new = ssd_step(*(one[:, None] for one in inputs), kept)
        real = (segment > 0)[:, None, None, None]
        return (jnp.where(real, new, memory), jnp.where(real[:, 0, 0, 0], segment, before)), out[:, 0]

    start = jnp.zeros((x.shape[0], N, S, H)), segment_ids[:, 0]
    tokens = tuple(jnp.moveaxis(one, 1, 0) for one in (x, log_decay, b, c, segment_ids))
    (memory, _), out = lax.scan(step, start, tokens)
    return jnp.moveaxis(out, 0, 1), memory


@partial(jax.jit, static_argnums=0)
def value_and_grads(f, inputs, segment_ids):
    """Outputs at real tokens, the last memory, and gradients of a function of both with respect to all inputs."""
    real = (segment_ids > 0)[..., None, None]

    def total(*inputs):
        out, memory = f(*inputs, segment_ids)
        out = jnp.where(real, out, 0.0)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.cos(memory)), (out, memory)

    (_, values), grads = jax.value_and_grad(total, range(4), has_aux=True)(*inputs)
    return *values, *grads


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_chunks_match_one_token_at_a_time(chunk):
    segment_ids = segments_of(ROWS)
    inputs = random_inputs(segment_ids.shape)
    expected = value_and_grads(one_by_one, inputs, segment_ids)
    assert_close(value_and_grads(partial(ssd, chunk=chunk), inputs, segment_ids), expected)


@pytest.mark.parametrize("decay", [1.0, 100.0])
def test_documents_of_a_row_match_each_by_itself(decay):
    """Even weak decays behind strong ones, whose sum up to there is in the thousands."""
    lengths = [9, 30, 25]
    segment_ids = segments_of([lengths])
    inputs = random_inputs(segment_ids.shape, decay)
    inputs[1] = inputs[1].at[:, 39:].multiply(0.01 / decay)
    together = value_and_grads(partial(ssd, chunk=64), inputs, segment_ids)
    # The memory is the last document's, so only there does the function depend on it.
    for i, start in enumerate(np.cumsum([0, *lengths[:-1]])):
        here = slice(start, start + lengths[i])
        f = partial(ssd, chunk=64) if i == 2 else lambda *inputs: (ssd(*inputs)[0], jnp.zeros((1, N, S, H)))
        alone = value_and_grads(f, [one[:, here] for one in inputs], segment_ids[:, here])
        assert_close([one[:, here] for one in (together[0], *together[2:])], (alone[0], *alone[2:]))
        if i == 2:
            assert_close(together[1:2], alone[1:2])


def test_no_input_of_padding_has_a_gradient():
    segment_ids = segments_of(ROWS)
    inputs = random_inputs(segment_ids.shape)
    padding = segment_ids[1] == 0
    for grad in value_and_grads(partial(ssd, chunk=8), inputs, segment_ids)[2:]:
        assert not np.any(grad[1][padding])
        assert np.any(grad[1][~padding])


def test_padding_only():
    inputs = random_inputs((2, 9))
    for one in value_and_grads(partial(ssd, chunk=4), inputs, jnp.zeros((2, 9), jnp.int32)):
        assert not np.any(one)


@pytest.mark.parametrize("decay", [0.0, 1e-4, 1e4])
def test_extreme_decays_have_finite_gradients(decay):
    segment_ids = segments_of(ROWS)
    inputs = random_inputs(segment_ids.shape, decay, jnp.bfloat16)
    for one in value_and_grads(ssd, inputs, segment_ids):
        assert np.all(np.isfinite(np.asarray(one, np.float32)))
