"""The fused head and loss against the plain formula, values and gradients, on one device and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sft_jax.models.head import Head, capped
from sft_jax.sharding import make_mesh
from sft_jax.training.cross_entropy import PLAIN, Terms, chunk_size, masked_cross_entropy

pytestmark = pytest.mark.smoke
ALL_TERMS = Terms(label_smoothing=0.1, z_loss=0.01)


def problem(tied, vocab, share=0.4, rows=8, length=12, dim=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(rows, length, dim)), dtype)
    weight = jnp.asarray(rng.normal(size=(vocab, dim) if tied else (dim, vocab)), dtype)
    targets = jnp.asarray(rng.integers(0, vocab, (rows, length)), jnp.int32)
    mask = jnp.asarray((rng.random((rows, length)) < share) * rng.random((rows, length)), jnp.float32)
    return hidden, weight, targets, mask


def plain(hidden, weight, targets, mask, tied, terms=PLAIN, softcap=None):
    logits = capped(hidden @ (weight.T if tied else weight), softcap)
    labels = optax.smooth_labels(jax.nn.one_hot(targets, logits.shape[-1]), terms.label_smoothing)
    losses = optax.softmax_cross_entropy(logits, labels) + terms.z_loss * jax.nn.logsumexp(logits, -1) ** 2
    return jnp.sum(losses * mask)


def fused(hidden, weight, targets, mask, tied, terms=PLAIN, softcap=None, chunk=None):
    head = Head(weight, 0 if tied else 1, hidden.dtype, softcap)
    return masked_cross_entropy(hidden, head, targets, mask, terms, chunk)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("terms", "softcap"), [(PLAIN, None), (ALL_TERMS, None), (ALL_TERMS, 5.0)])
@pytest.mark.parametrize("chunk", [1, 5, 200])
def test_loss_and_gradients_are_those_of_the_plain_formula(tied, terms, softcap, chunk):
    hidden, weight, targets, mask = problem(tied, 37)

    def ours(hidden, weight):
        return fused(hidden, weight, targets, mask, tied, terms, softcap, chunk)[0]

    def reference(hidden, weight):
        return plain(hidden, weight, targets, mask, tied, terms, softcap)

    (loss, grads), (expected, expected_grads) = (
        jax.value_and_grad(f, (0, 1))(hidden, weight) for f in (ours, reference)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for one, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * float(jnp.abs(other).max()), rtol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_any_share_of_targets(share):
    hidden, weight, targets, mask = problem(False, 50, share, rows=3, length=40)
    ours = jax.value_and_grad(lambda h: 3.0 * fused(h, weight, targets, mask, False)[0])(hidden)
    reference = jax.value_and_grad(lambda h: 3.0 * plain(h, weight, targets, mask, False))(hidden)
    for one, other in zip(ours, reference, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 1, 8), (2, 2, 1, 2), (1, 4, 1, 2), (1, 1, 4, 2), (2, 1, 2, 2), (1, 2, 4, 1)],
)
@pytest.mark.parametrize(("tied", "vocab"), [(False, 40), (True, 37)])
def test_on_a_mesh(sizes, tied, vocab):
    """The vocabulary split over devices, also where it does not divide; everything that is reported as well."""
    hidden, weight, targets, mask = problem(tied, vocab)

    def everything(hidden, weight):
        return fused(hidden, weight, targets, mask, tied, ALL_TERMS, 5.0, 4)

    compute = jax.jit(jax.value_and_grad(everything, (0, 1), has_aux=True))
    alone = compute(hidden, weight)
    with jax.set_mesh(make_mesh(*sizes)):
        together = jax.jit(jax.value_and_grad(everything, (0, 1), has_aux=True))(hidden, weight)
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6, rtol=1e-5)


def test_masked_positions_do_not_count_whatever_they_hold():
    hidden, weight, targets, mask = problem(True, 37)
    spoiled = jnp.where((mask > 0)[..., None], hidden, np.nan)
    grad = jax.grad(lambda h: fused(h, weight, targets, mask, True)[0])
    np.testing.assert_array_equal(grad(spoiled), grad(hidden))
    assert np.array_equal(np.any(grad(hidden) != 0, axis=-1), mask > 0)


def test_what_is_found_at_each_position():
    hidden, weight, targets, mask = problem(False, 37)
    _, found = fused(hidden, weight, targets, mask, False, chunk=7)
    log_probs = jax.nn.log_softmax(hidden @ weight, axis=-1)
    nll = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.loss, nll * mask, atol=1e-5)
    np.testing.assert_array_equal(found.correct, (jnp.argmax(log_probs, -1) == targets) & (mask > 0))
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    np.testing.assert_allclose(found.entropy, jnp.where(mask > 0, entropy, 0.0), atol=1e-5)


def test_a_frozen_head_has_no_gradient():
    """No product of the shape of the head's gradient is computed, and no logits are held for a backward pass."""
    hidden, weight, targets, mask = problem(False, 50)
    text = str(jax.make_jaxpr(jax.grad(lambda h: fused(h, weight, targets, mask, False, chunk=4)[0]))(hidden))
    trained = str(
        jax.make_jaxpr(jax.grad(lambda h, w: fused(h, w, targets, mask, False, chunk=4)[0], (0, 1)))(hidden, weight)
    )
    assert trained.count("dot_general") == 3
    assert text.count("dot_general") == 2


def test_gradients_of_bfloat16_weights_are_added_up_in_float32():
    """A thousand equal contributions, each below the resolution of their sum."""
    hidden = jnp.ones((1, 1024, 1), jnp.bfloat16)
    weight = jnp.zeros((1, 2), jnp.float32)
    targets, mask = jnp.zeros((1, 1024), jnp.int32), jnp.full((1, 1024), 1.0)
    grad = jax.grad(lambda w: fused(hidden, w, targets, mask, False, chunk=8)[0])(weight)
    np.testing.assert_allclose(grad, [[-512.0, 512.0]], rtol=1e-6)


def test_chunks_are_bounded_by_memory_and_small_beside_the_batch():
    assert chunk_size(8192, 151_936) == 256
    assert chunk_size(1280, 32_000) == 256
    assert chunk_size(10**6, 1000) == 512
    assert chunk_size(3, 1000) == 1
    assert chunk_size(16_384, 128_256) == 256
    assert chunk_size(16_384, 128_256, gradient_bytes=4 * 128_256 * 2048) == 512  # little beside the gradient
    assert chunk_size(1280, 32_000, gradient_bytes=4 * 32_000 * 512) == 256
