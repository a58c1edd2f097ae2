"""Attention kernels against a dense reference, values and gradients; and which of them is chosen."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.architecture import Architecture, Rope
from sft_jax.errors import UserError
from sft_jax.models.attention.kernel import Kernel, attention, choose_kernel
from sft_jax.models.attention.splash import splash_attention
from sft_jax.models.attention.xla import xla_attention
from sft_jax.sharding import make_mesh

pytestmark = pytest.mark.smoke


def dense_attention(q, k, v, segments, window=None, softcap=None):
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    t = jnp.arange(q.shape[1])
    visible = (t[:, None] >= t[None]) & (segments[:, :, None] == segments[:, None])
    if window is not None:
        visible &= t[:, None] - t[None] < window
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]).astype(np.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), -1), v)


def random_inputs(rows, heads, kv_heads, head_dim):
    """Queries, keys, values of rows given as lengths of their documents; what is left is padding."""
    rng = np.random.default_rng(0)
    length = max(sum(row) for row in rows)
    segments = np.zeros((len(rows), length), np.int32)
    for r, row in enumerate(rows):
        segments[r, : sum(row)] = np.repeat(np.arange(1, len(row) + 1), row)
    q, k, v = (
        jnp.asarray(rng.normal(size=(len(rows), length, n, head_dim)), jnp.float32) for n in (heads, kv_heads, kv_heads)
    )
    return q, k, v, jnp.asarray(segments)


def assert_alike(ours, q, k, v, segments, **options):
    """Equal outputs and gradients of a function of them; padding is left out."""
    real = (segments > 0)[..., None, None]

    def value_and_grads(f):
        def total(q, k, v):
            out = f(q, k, v, segments, **options)
            return jnp.sum(jnp.where(real, jnp.sin(out), 0.0)), jnp.where(real, out, 0.0)

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)

    (_, out), grads = value_and_grads(ours)
    (_, expected), expected_grads = value_and_grads(dense_attention)
    np.testing.assert_allclose(out, expected, atol=5e-6, rtol=1e-5)
    for one, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-5)


ROWS = [[11, 19], [3, 20], [1, 1, 28]]


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("block", [4, 7, 64])
def test_xla_matches_dense(window, softcap, block):
    assert_alike(partial(xla_attention, block=block), *random_inputs(ROWS, 6, 2, 6), window=window, softcap=softcap)


@pytest.mark.parametrize(("window", "softcap", "heads"), [(None, None, (4, 2)), (40, 3.0, (2, 2)), (None, 3.0, (3, 1))])
def test_splash_matches_dense(window, softcap, heads):
    """The Pallas kernel, interpreted; blocks smaller than the row, documents across blocks."""
    inputs = random_inputs([[100, 156], [3, 130, 90]], *heads, 64)
    assert_alike(partial(splash_attention, block=128, interpret=True), *inputs, window=window, softcap=softcap)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8), (8, 1, 1)])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_attention_on_a_mesh(sizes, kv_heads):
    """Fewer key/value heads than the tensor axis has devices, and more; rows that do not divide."""
    rows = [*ROWS, [30]] if sizes[0] == 2 else ROWS
    inputs = random_inputs(rows, 16, kv_heads, 4)
    with jax.set_mesh(make_mesh(*sizes)):
        assert_alike(partial(attention, kernel=Kernel("xla", 8)), *inputs, window=9)


@pytest.mark.parametrize("block", [4, 7])
def test_other_documents_do_not_change_a_document(block):
    q, k, v, segments = random_inputs([[8, 12]], 2, 2, 4)
    out = xla_attention(q, k, v, segments, block=block)
    changed = xla_attention(q, k.at[:, :8].add(3.0), v.at[:, :8].add(3.0), segments, block=block)
    assert np.array_equal(out[:, 8:], changed[:, 8:])
    assert not np.array_equal(out[:, :8], changed[:, :8])


def test_blocks_that_see_nothing_are_not_computed():
    """Not-a-number in a block of keys that no query of another document may see: it would spoil all it touches."""
    q, k, v, segments = random_inputs([[8, 8, 8]], 2, 2, 4)
    out, pullback = jax.vjp(lambda q, k, v: xla_attention(q, k, v, segments, block=8), q, k.at[:, :8].set(np.nan), v)
    assert np.isnan(out[:, :8]).all()
    assert np.isfinite(out[:, 8:]).all()
    for gradient in pullback(jnp.ones_like(out)):
        assert np.isfinite(gradient[:, 8:]).all()


def device(platform, capability="9.0"):
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform, compute_capability=capability)]))
    return mesh


def llama(head_dim=64):
    return Architecture("llama", 100, 64, 64, 2, 4, 2, head_dim, 1e-5, Rope(1e4), True)


@pytest.mark.parametrize(
    ("platform", "dtype", "row_length", "head_dim", "expected"),
    [
        ("tpu", "bfloat16", 2048, 128, "splash"),
        ("tpu", "bfloat16", 2000, 128, "xla"),
        ("gpu", "bfloat16", 2048, 128, "cudnn"),
        ("gpu", "float32", 2048, 128, "xla"),
        ("gpu", "bfloat16", 2048, 256, "xla"),
        ("cpu", "float32", 2048, 64, "xla"),
    ],
)
def test_choice(platform, dtype, row_length, head_dim, expected):
    chosen = choose_kernel("auto", device(platform), llama(head_dim), dtype, row_length)
    assert chosen.name == expected
    assert choose_kernel("xla", device(platform), llama(head_dim), dtype, row_length).name == "xla"
    if expected == "xla" and platform != "cpu":
        assert "needs" in str(chosen)  # says why not the faster one


@pytest.mark.parametrize(
    ("requested", "platform", "row_length", "message"),
    [
        ("splash", "cpu", 2048, r"model.attention: splash needs a TPU; here can be used: auto, xla"),
        ("splash", "tpu", 2000, r"splash needs rows of a multiple of 128, not 2000 \(data.max_length\)"),
        ("cudnn", "tpu", 2048, r"cudnn needs an NVIDIA GPU; here can be used: auto, splash, xla"),
    ],
)
def test_what_cannot_be_used_is_refused(requested, platform, row_length, message):
    with pytest.raises(UserError, match=message):
        choose_kernel(requested, device(platform), llama(), "bfloat16", row_length)
