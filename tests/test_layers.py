"""Attention and loss against dense references, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sft_jax.models.attention import attention
from sft_jax.training.loss import masked_cross_entropy

pytestmark = pytest.mark.smoke


def dense_attention(q, k, v, segments, window):
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    t = jnp.arange(q.shape[1])
    visible = (t[:, None] >= t[None]) & (segments[:, :, None] == segments[:, None])
    if window is not None:
        visible &= t[:, None] - t[None] < window
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]).astype(np.float32)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), -1), v)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("query_chunk", [4, 7, 64])
def test_attention_matches_dense(window, query_chunk):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 30, n, 6)), jnp.float32) for n in (6, 2, 2))
    segments = jnp.asarray([[1] * 11 + [2] * 19, [1] * 3 + [2] * 20 + [0] * 7], jnp.int32)

    def value_and_grads(f):
        return jax.value_and_grad(lambda q, k, v: jnp.sum(jnp.sin(f(q, k, v))), (0, 1, 2))(q, k, v)

    ours = value_and_grads(lambda q, k, v: attention(q, k, v, segments, window, query_chunk))
    dense = value_and_grads(lambda q, k, v: dense_attention(q, k, v, segments, window))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), ours, dense)


def test_other_documents_do_not_change_a_document():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 20, 2, 4)), jnp.float32) for _ in range(3))
    segments = jnp.asarray([[1] * 8 + [2] * 12], jnp.int32)
    out = attention(q, k, v, segments, query_chunk=4)
    changed = attention(q, k.at[:, :8].add(3.0), v.at[:, :8].add(3.0), segments, query_chunk=4)
    assert np.array_equal(out[:, 8:], changed[:, 8:])
    assert not np.array_equal(out[:, :8], changed[:, :8])


@pytest.mark.parametrize("chunk_slots", [6, 10, 1000])
def test_loss_matches_optax(chunk_slots):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 11, 8)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(8, 37)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 37, (2, 11)), jnp.int32)
    mask = jnp.asarray(rng.random((2, 11)) < 0.4)

    def reference(hidden, head):
        losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets)
        return jnp.sum(jnp.where(mask, losses, 0.0))

    def ours(hidden, head):
        return jnp.sum(masked_cross_entropy(hidden, head, targets, mask, chunk_slots))

    a, b = (jax.value_and_grad(f, (0, 1))(hidden, head) for f in (ours, reference))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5), a, b)


def test_masked_positions_have_no_gradient():
    hidden = jnp.ones((1, 4, 3))
    mask = jnp.asarray([[True, False, True, False]])
    targets = jnp.zeros((1, 4), jnp.int32)
    head = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    grad = jax.grad(lambda h: jnp.sum(masked_cross_entropy(h, head, targets, mask)))(hidden)
    assert np.array_equal(np.any(grad != 0, axis=-1), mask)
