"""The rotation of queries and keys, in the form that each platform computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.models.architecture import Rope
from sft_jax.models.rope import _rotate_by_halves, _rotate_by_product, rotate, sin_cos

pytestmark = pytest.mark.smoke

POSITIONS = jnp.asarray([[0, 1, 2, 3, 0, 1, 2047, 131071]])
ANGLES = sin_cos(POSITIONS, Rope(1e4), 16)


def normal(seed, dtype):
    return jax.random.normal(jax.random.key(seed), (1, 8, 3, 16), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_forms_turn_channel_pairs_by_the_angle(dtype):
    """Against complex numbers."""
    x = normal(0, dtype)
    sin, cos = (np.asarray(one, np.float64)[:, :, None] for one in ANGLES)
    pairs = np.asarray(x[..., :8], np.float64) + 1j * np.asarray(x[..., 8:], np.float64)
    turned = pairs * (cos + 1j * sin)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    for form in (_rotate_by_halves, _rotate_by_product):
        found = np.asarray(jax.jit(form)(x, *ANGLES), np.float64)
        np.testing.assert_allclose(found, expected, rtol=0, atol=4 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_with_a_permutation_loses_no_bit(dtype):
    x, sin, cos = normal(3, dtype), jnp.ones((1, 8, 8)), jnp.zeros((1, 8, 8))
    quarter = jnp.concatenate([-x[..., 8:], x[..., :8]], axis=-1)
    np.testing.assert_array_equal(jax.jit(_rotate_by_product)(x, sin, cos), quarter)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_is_that_of_automatic_differentiation(dtype):
    x, d_out = normal(1, dtype), normal(2, dtype)
    (found,) = jax.jit(lambda x, d: jax.vjp(lambda x: rotate(x, *ANGLES), x)[1](d))(x, d_out)
    (expected,) = jax.jit(lambda x, d: jax.vjp(lambda x: _rotate_by_halves(x, *ANGLES), x)[1](d))(x, d_out)
    assert found.dtype == dtype
    sin, cos = ANGLES
    on_tpu = jax.jit(_rotate_by_product)(d_out, -sin, cos)
    for one in (found, on_tpu):
        difference = np.abs(np.asarray(one, np.float64) - np.asarray(expected, np.float64))
        assert difference.max() <= 4 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize(("platform", "products"), [("cpu", 0), ("cuda", 0), ("tpu", 1)])
def test_each_platform_has_its_form(platform, products):
    lowered = jax.jit(rotate).trace(normal(0, jnp.bfloat16), *ANGLES).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("dot_general") == products
