"""Attention kernels against a dense reference, values and gradients; and which of them is chosen."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.errors import UserError
from sft_jax.models.attention.backend import Backend, attention, choose_backend
from sft_jax.models.attention.cudnn import cudnn_attention
from sft_jax.models.attention.spec import AttentionSpec
from sft_jax.models.attention.splash import splash_attention, splash_mask
from sft_jax.models.attention.split import SplitSequences
from sft_jax.models.attention.triton import Tiles, Tuning, triton_attention
from sft_jax.models.attention.xla import xla_attention
from sft_jax.sharding import MESH_AXES, make_mesh


def dense_attention(q, k, v, segments, window=None, softcap=None, sinks=None):
    """A sink is a score that no key has; the softmax counts it."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    t = jnp.arange(q.shape[1])
    visible = (t[:, None] >= t[None]) & (segments[:, :, None] == segments[:, None])
    if window is not None:
        visible &= t[:, None] - t[None] < window
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]).astype(np.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, column], axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, -1)[..., : k.shape[1]], v)


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


@pytest.mark.smoke
@pytest.mark.parametrize(("window", "softcap", "heads"), [(None, None, (4, 2)), (40, 3.0, (2, 2)), (None, 3.0, (3, 1))])
def test_splash_matches_dense(window, softcap, heads):
    """The Pallas kernel, interpreted; blocks smaller than the row, documents across blocks."""
    inputs = random_inputs([[100, 156], [3, 130, 90]], *heads, 64)
    assert_alike(partial(splash_attention, block=128, interpret=True), *inputs, window=window, softcap=softcap)


@pytest.mark.smoke
@pytest.mark.parametrize("sizes", [(2, 2, 1, 2), (1, 1, 1, 8), (8, 1, 1, 1)])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_attention_on_a_mesh(sizes, kv_heads):
    """Fewer key/value heads than the tensor axis has devices, and more; rows that do not divide."""
    rows = [*ROWS, [30]] if sizes[0] == 2 else ROWS
    inputs = random_inputs(rows, 16, kv_heads, 4)
    with jax.set_mesh(make_mesh(*sizes)):
        assert_alike(partial(attention, backend=Backend("xla", 8)), *inputs, window=9)


PARTS = {"end": np.arange(17, 30), "halves": np.r_[4:8, 22:26], "any": np.array([29, 3, 0, 12])}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("ours", [partial(xla_attention, block=4), partial(cudnn_attention, implementation="xla")])
def test_some_queries_against_all_keys(part, window, ours):
    q, k, v, segments = random_inputs(ROWS, 6, 2, 6)
    positions = jnp.asarray(PARTS[part], jnp.int32)
    seen = (segments[:, positions] > 0)[..., None, None]

    def value_and_grads(f):
        def total(q, k, v):
            out = jnp.where(seen, f(q, k, v), 0.0)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)

    found = value_and_grads(lambda q, k, v: ours(q[:, positions], k, v, segments, window, positions=positions))
    expected = value_and_grads(lambda q, k, v: dense_attention(q, k, v, segments, window)[:, positions])
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


def on_mesh(sizes):
    return jax.set_mesh(make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))]))


@pytest.mark.parametrize(
    ("sizes", "kv_heads"), [((1, 1, 8, 1), 2), ((2, 1, 2, 2), 2), ((1, 1, 2, 4), 2), ((1, 2, 3, 1), 8)]
)
@pytest.mark.parametrize("window", [None, 9])
def test_xla_with_rows_in_parts(sizes, kv_heads, window):
    """Documents across parts, and parts that are halved and exchanged or (three of them, or a window) are not."""
    length = 48
    inputs = random_inputs([[13, 35], [48], [20, 20], [1, 46]], 8, kv_heads, 4)
    assert inputs[0].shape[1] == length
    with on_mesh(sizes):
        assert_alike(partial(attention, backend=Backend("xla", 4)), *inputs, window=window)


@pytest.mark.parametrize(
    ("sizes", "window", "softcap"), [((1, 1, 2, 2), None, None), ((1, 1, 2, 1), 100, 3.0), ((1, 1, 4, 1), None, None)]
)
def test_splash_with_rows_in_parts(sizes, window, softcap):
    """The Pallas kernel, interpreted; halves of parts that are a block, and that are less."""
    inputs = random_inputs([[3, 200, 309]], 2, 2, 64)
    with on_mesh(sizes):
        kernel = Backend("splash", 128, interpret=True)
        assert_alike(partial(attention, backend=kernel), *inputs, window=window, softcap=softcap)


@pytest.mark.smoke
@pytest.mark.parametrize("window", [None, 1, 12, 30])
def test_blocks_of_a_mask_are_known_without_its_entries(window):
    """Seen, hidden and in between, for queries in and out of order."""
    keys = np.arange(48)
    for positions in (
        SplitSequences.of(48, 3, "any", window).positions(),
        SplitSequences.of(48, 4, "any", None).positions(),
    ):
        mask = splash_mask(positions, window)
        order = positions.reshape(-1)[:, None]
        dense = (keys <= order) & (keys > order - (window or 48))
        for block in (4, 12):
            for i, j in np.ndindex(48 // block, 48 // block):
                at = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
                np.testing.assert_array_equal(mask[at], dense[at])


@pytest.mark.smoke
@pytest.mark.parametrize("num", [2, 4, 6])
def test_parts_are_balanced(num):
    """Every position is taken once, and all devices have the same number of pairs of a query and a key."""
    positions = SplitSequences.of(24, num, "any", None).positions()
    assert sorted(positions.reshape(-1)) == list(range(24))
    assert len(set((positions + 1).sum(axis=1))) == 1
    assert SplitSequences.of(8, 2, "any", None).positions().tolist() == [[0, 1, 6, 7], [4, 5, 2, 3]]
    assert SplitSequences.of(8, 2, "any", window=3).positions().tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.smoke
def test_keys_are_gathered_and_their_gradients_scattered():
    """What devices trade: keys and values there, parts of their gradients back; never scores or whole queries."""
    q, k, v, segments = random_inputs([[48]], 8, 2, 4)
    with on_mesh((1, 1, 8, 1)):
        text = str(jax.make_jaxpr(jax.grad(lambda *x: attention(*x, segments).sum(), (0, 1, 2)))(q, k, v))
    assert text.count(" all_gather[") == 2
    assert text.count(" reduce_scatter[") == 2


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
    positions = jnp.arange(8, 16)  # of the second document: neither the one before nor the one behind
    spoiled = k.at[:, :8].set(np.nan).at[:, 16:].set(np.nan)
    assert np.isfinite(xla_attention(q[:, positions], spoiled, v, segments, block=8, positions=positions)).all()


SCATTERED, ALIGNED = [[70, 130, 1, 55], [3, 190, 40]], [[256], [128, 64]]


@pytest.mark.parametrize(
    ("tiles", "rows", "window", "softcap"),
    [
        ((64, 64), SCATTERED, None, None),
        ((64, 64), ALIGNED, 40, 2.0),
        ((128, 64), ALIGNED, None, 2.0),
        ((128, 64), SCATTERED, 1, None),
        ((32, 128), SCATTERED, 40, None),
        ((32, 128), ALIGNED, None, None),
    ],
)
def test_triton_matches_dense(tiles, rows, window, softcap):
    """The Pallas kernels, interpreted; documents within, across and at the edges of tiles, and padding."""
    sizes = Tiles(*tiles, warps=4, stages=2)
    ours = partial(triton_attention, tuning=Tuning(sizes, sizes, sizes), interpret=True)
    assert_alike(ours, *random_inputs(rows, 4, 2, 16), window=window, softcap=softcap)


@pytest.mark.smoke
def test_triton_computes_its_documents_only():
    """What another document holds is not even read where no tile is shared: nothing of it comes out, not a nan."""
    q, k, v, segments = random_inputs([[64, 128, 64]], 4, 2, 16)
    spoiled = [x.at[:, :64].set(np.nan).at[:, 192:].set(np.nan) for x in (q, k, v)]
    inside = jnp.zeros_like(q).at[:, 64:192].set(1.0)

    def run(q, k, v):
        out, pullback = jax.vjp(partial(triton_attention, segment_ids=segments, interpret=True), q, k, v)
        return out, *pullback(inside)

    for one, other in zip(jax.jit(run)(*spoiled), jax.jit(run)(q, k, v), strict=True):
        np.testing.assert_array_equal(one[:, 64:192], other[:, 64:192])


def device(platform, capability="9.0", sequence=1):
    devices = np.array([SimpleNamespace(platform=platform, compute_capability=capability)])
    return SimpleNamespace(devices=devices, shape=dict.fromkeys(MESH_AXES, 1) | {"sequence": sequence})


def llama(head_dim=64):
    return [AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=head_dim)]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("platform", "dtype", "row_length", "head_dim", "expected"),
    [
        ("tpu", "bfloat16", 2048, 128, "splash"),
        ("tpu", "bfloat16", 2000, 128, "xla"),
        ("gpu", "bfloat16", 2048, 128, "triton"),
        ("gpu", "bfloat16", 2000, 128, "cudnn"),
        ("gpu", "bfloat16", 2048, 96, "cudnn"),
        ("gpu", "float32", 2048, 128, "xla"),
        ("gpu", "bfloat16", 2048, 256, "xla"),
        ("cpu", "float32", 2048, 64, "xla"),
    ],
)
def test_choice(platform, dtype, row_length, head_dim, expected):
    chosen = choose_backend("auto", device(platform), llama(head_dim), dtype, row_length)
    assert chosen.name == expected
    assert choose_backend("xla", device(platform), llama(head_dim), dtype, row_length).name == "xla"
    if expected == "xla" and platform != "cpu":
        assert "needs" in str(chosen)  # says why not the faster one


@pytest.mark.smoke
def test_choice_for_rows_in_parts():
    tpu, gpu = device("tpu", sequence=4), device("gpu", sequence=4)
    chosen = choose_backend("auto", tpu, llama(), "bfloat16", 2048)
    assert str(chosen) == "splash (blocks of up to 512; sequences in 4 shards, keys all-gathered)"
    chosen = choose_backend("auto", tpu, llama(), "bfloat16", 640)
    assert chosen.name == "xla"
    assert (
        "needs sequences of a multiple of 512 tokens, not 640 (data.max_length, in 4 shards by mesh.sequence)"
        in str(chosen)
    )
    assert choose_backend("auto", gpu, llama(), "bfloat16", 2048).name == "cudnn"
    with pytest.raises(UserError, match=r"triton needs whole sequences, .* splits them; .* cudnn, xla"):
        choose_backend("triton", gpu, llama(), "bfloat16", 2048)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("requested", "platform", "row_length", "message"),
    [
        ("splash", "cpu", 2048, r"model.attention: splash needs a TPU; use one of auto, xla"),
        ("splash", "tpu", 2000, r"splash needs sequences of a multiple of 128 tokens, not 2000 \(data.max_length\)"),
        ("cudnn", "tpu", 2048, r"cudnn needs an NVIDIA GPU; use one of auto, splash, xla"),
    ],
)
def test_what_cannot_be_used_is_refused(requested, platform, row_length, message):
    with pytest.raises(UserError, match=message):
        choose_backend(requested, device(platform), llama(), "bfloat16", row_length)
