"""Moments and weights in less memory: what is rounded stays right on average, everything else stays what it was."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from sft_jax.config import OptimizerConfig
from sft_jax.training.moments import Rounded, scale_by_factored_adam, scale_by_rounded_adam
from sft_jax.training.optimizer import make_optimizer
from sft_jax.training.rounding import apply_updates, random_words, stochastic_round

KEY = jax.random.key(7)
ADAM = (0.9, 0.999, 1e-8)
LOW = {"model__param_dtype": "bfloat16", "optimizer__moments": "bfloat16"}


def floats(patterns):
    return np.asarray(patterns, np.uint32).view(np.float32)


def bits(x):
    return np.asarray(x).view(np.uint16)


def normal(shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


# -- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_what_bfloat16_can_express_is_left_alone():
    patterns = np.arange(2**16, dtype=np.uint32) << 16  # every bfloat16 there is: denormals, infinities, NaN
    x = floats(patterns)
    rounded = bits(stochastic_round(x, KEY))
    nan = np.isnan(x)
    assert np.array_equal(rounded[~nan], (patterns >> 16).astype(np.uint16)[~nan])
    assert np.isnan(rounded.view(ml_dtypes.bfloat16)[nan].astype(np.float32)).all()
    # NaN with low bits, which added bits would carry out of: to infinity, or round to zero
    low = floats([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF] * 64)
    assert np.isnan(stochastic_round(low, KEY).astype(jnp.float32)).all()


@pytest.mark.smoke
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("number", [1.0, 1.001, 3.1415927, 255.9, 6.02e23, 1.7e-38, 4.3e-39, 3e-41])
def test_rounding_is_unbiased(number, sign):
    """One of the two neighbours, so often that the mean is the number; the last two are denormal."""
    num = 2**16
    x = np.full(num, sign * number, np.float32)
    rounded = np.asarray(stochastic_round(x, KEY)).astype(np.float64)
    pattern = int(x[:1].view(np.uint32)[0])
    lower, upper = floats([pattern & 0xFFFF0000, (pattern & 0xFFFF0000) + 0x10000]).astype(np.float64)
    share = (pattern & 0xFFFF) / 2**16
    assert set(rounded) <= {lower, upper}
    error = (share * (1 - share) / num) ** 0.5 * abs(upper - lower)
    assert abs(rounded.mean() - float(x[0])) <= 4.5 * error


@pytest.mark.smoke
def test_words_are_even_and_unlike_their_neighbours():
    shape = (3, 128, 256)
    words = np.asarray(random_words(KEY, shape))
    assert len(np.unique(words[0])) == words[0].size  # a permutation of the places
    streams = [words.ravel(), np.asarray(random_words(jax.random.fold_in(KEY, 1), shape)).ravel()]
    for stream in streams:
        for shift in (0, 8, 16, 24):
            counts = np.bincount((stream >> shift) & 255, minlength=256)
            expected = stream.size / 256
            assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * (2 * 255) ** 0.5  # chi-squared

    def halves(x):  # the two numbers of 16 bits that a word is used as
        return [((x >> shift) & 0xFFFF).astype(np.float64).ravel() for shift in (0, 16)]

    pairs = [
        (words[:, :, 1:], words[:, :, :-1]),
        (words[:, 1:], words[:, :-1]),
        (words[1:], words[:-1]),
        (streams[0], streams[1]),  # two steps
    ]
    compared = [(x, y) for a, b in pairs for x in halves(a) for y in halves(b)] + [tuple(halves(words))]
    for x, y in compared:
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / x.size**0.5
    assert random_words(KEY, ()).shape == ()
    assert random_words(KEY, (5,)).shape == (5,)


def test_small_updates_vanish_to_the_nearest_and_do_not_at_random():
    """A learning rate of 1e-4 on weights of 1, whose neighbours in bfloat16 are 0.004 and 0.008 away."""
    params = {"w": jnp.ones((64, 64), jnp.bfloat16), "adapter": jnp.ones(8)}
    updates = {"w": jnp.full((64, 64), -1e-4), "adapter": jnp.full(8, -1e-4)}
    nearest = rounded = params
    for step in range(100):
        nearest = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), nearest, updates)
        rounded = apply_updates(rounded, updates, jax.random.fold_in(KEY, step))
    assert (nearest["w"] == 1).all()
    assert rounded["w"].dtype == jnp.bfloat16
    assert float(rounded["w"].astype(jnp.float32).mean()) == pytest.approx(0.99, abs=5e-4)
    assert rounded["adapter"].dtype == jnp.float32
    np.testing.assert_allclose(rounded["adapter"], 0.99, rtol=1e-5)  # a hundred roundings to float32


def test_a_second_moment_falls_and_to_the_nearest_it_would_not():
    transform = scale_by_rounded_adam(*ADAM, KEY)
    params = {"w": jnp.zeros((64, 64))}
    ones = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    state = Rounded(jnp.int32(10**4), ones, ones)
    nearest = ones["w"]
    update = jax.jit(transform.update)
    for _ in range(200):
        _, state = update(params, state)
        nearest = (0.999 * nearest.astype(jnp.float32)).astype(jnp.bfloat16)
    assert (nearest == 1).all()
    assert float(state.nu["w"].astype(jnp.float32).mean()) == pytest.approx(0.999**200, rel=2e-3)


# -- moments ----------------------------------------------------------------------------------------------------------


def travelled(moments, seed=0, steps=50):
    """Where fifty steps lead on a random least-squares problem with noisy gradients, the same for all."""
    matrix, goal = normal((48, 32), 1), normal((2, 32, 40), 2)
    labels = {("layers", "w"): "full", ("layers", "scale"): "full_no_decay"}
    params = {"layers": {"w": normal((2, 32, 40), 3), "scale": jnp.ones((2, 40))}}
    optimizer = make_optimizer(OptimizerConfig(moments=moments, weight_decay=0.01), labels, seed)

    def loss(params, noise):
        made = params["layers"]["w"] * params["layers"]["scale"][:, None]
        return jnp.mean((matrix @ (made - goal) + noise) ** 2)

    @jax.jit
    def step(params, state, noise):
        grads = jax.grad(loss)(params, noise)
        updates, state = optimizer.update(grads, state, params, learning_rate=jnp.float32(1e-2))
        return optax.apply_updates(params, updates), state

    start, state = params, optimizer.init(params)
    for i in range(steps):
        params, state = step(params, state, normal((2, 48, 40), 100 + i))
    return np.asarray(params["layers"]["w"] - start["layers"]["w"]), state


def test_bfloat16_moments_lead_where_float32_ones_do():
    """One run within 1 % of the way gone, the mean of 32 seeds within a quarter of that: errors, and no bias."""
    expected, exact = travelled("float32")
    found, state = travelled("bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(exact) if leaf.ndim} == {jnp.dtype(jnp.float32)}
    one = relative(found, expected)
    assert 0 < one < 0.01, one
    mean = np.mean([travelled("bfloat16", seed)[0] for seed in range(32)], axis=0)
    assert relative(mean, expected) < one / 4, (relative(mean, expected), one)
    assert not np.array_equal(travelled("bfloat16", 1)[0], found)
    assert np.array_equal(travelled("bfloat16")[0], found)


@pytest.mark.smoke
def test_a_factored_second_moment_is_optaxs():
    """With b1 = 0 and no eps; Adam's bias correction as a decay that changes (Shazeer & Stern 2018, section 7.1)."""
    b2 = 0.99
    ours = scale_by_factored_adam(0.0, b2, 0.0, KEY)
    theirs = optax.scale_by_factored_rms(
        min_dim_size_to_factor=2,
        epsilon=0.0,
        decay_rate_fn=lambda i, _: b2 * (1 - b2 ** jnp.float32(i)) / (1 - b2 ** jnp.float32(i + 1)),
    )
    params = {"w": jnp.zeros((24, 40))}
    state, reference = ours.init(params), theirs.init(params)
    for i in range(5):
        grads = {"w": normal((24, 40), i) * jnp.exp(normal((24, 1), 50 + i))}
        found, state = ours.update(grads, state)
        with jax.numpy_dtype_promotion("standard"):
            expected, reference = theirs.update(grads, reference, params)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-4)


def test_each_layer_is_factored_by_itself_and_rank_one_is_adam():
    transform = scale_by_factored_adam(*ADAM, KEY)
    grads = {"w": normal((3, 8, 6)) * jnp.asarray([1e-12, 1.0, 1e12]).reshape(3, 1, 1)}
    state = transform.init(grads)
    assert state.rows["w"].shape == (3, 8, 1)
    assert state.columns["w"].shape == (3, 1, 6)
    assert {state.rows["w"].dtype, state.columns["w"].dtype} == {jnp.dtype(jnp.float32)}
    together, _ = transform.update(grads, state)
    for layer in range(3):
        alone = {"w": grads["w"][layer]}
        found, _ = transform.update(alone, transform.init(alone))
        np.testing.assert_allclose(together["w"][layer], found["w"], rtol=1e-5)

    adam = optax.scale_by_adam(*ADAM)
    rank_one = {"w": normal((2, 8, 1), 4) * normal((2, 1, 6), 5)}
    state, reference = transform.init(rank_one), adam.init(rank_one)
    for i in range(3):
        grads = {"w": rank_one["w"] * (0.5 if i == 1 else 1.0)}
        found, state = transform.update(grads, state)
        with jax.numpy_dtype_promotion("standard"):
            expected, reference = adam.update(grads, reference)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-2)  # the first moment is bfloat16
    nothing, _ = transform.update({"w": jnp.zeros((2, 8, 6))}, transform.init(rank_one))
    assert not nothing["w"].any()
