"""Products with quantized matrices as Pallas kernels, interpreted, against the dequantized matrix."""

import jax
import jax.numpy as jnp
import pytest

from sft_jax.models.quantize import Format, dequantize, linear_format, quantize
from sft_jax.models.quantized_product import Tiles, quantized_dot, unsupported_reason

SMALL = Tiles(rows=32, columns=64, inputs=128)


def _matrix(method, in_dim, out_dim):
    weight = jax.random.normal(jax.random.key(0), (in_dim, out_dim), jnp.float32)
    weight *= jnp.linspace(0.1, 2.0, in_dim)[:, None] * jnp.linspace(0.5, 3.0, out_dim)  # scales that differ
    fmt = linear_format(method, in_dim, out_dim)
    return quantize(weight, fmt), fmt


@pytest.mark.parametrize("method", ["int8", "nf4"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("in_dim", "out_dim", "rows"), [(256, 128, (64,)), (128, 64, (2, 9))])
def test_products_are_those_of_the_dequantized_matrix(method, transposed, in_dim, out_dim, rows):
    """Bit for bit the rounded weights, so that only the order of float32 sums differs; also with a part of a tile."""
    arrays, fmt = _matrix(method, in_dim, out_dim)
    weight = dequantize(arrays, fmt, jnp.bfloat16).astype(jnp.float32)
    x = jax.random.normal(jax.random.key(1), (*rows, out_dim if transposed else in_dim), jnp.bfloat16)
    found = quantized_dot(x, arrays, fmt, transposed, SMALL, interpret=True)
    expected = jnp.dot(x.astype(jnp.float32), weight.T if transposed else weight, precision="highest")
    assert found.dtype == jnp.bfloat16
    assert found.shape == expected.shape
    error = jnp.abs(found.astype(jnp.float32) - expected)
    assert float(jnp.max(error / (1e-3 * jnp.max(jnp.abs(expected)) + jnp.abs(expected)))) < 2**-8
    # Each output by itself: one input is one row of the matrix.
    index = 70 % x.shape[-1]
    one = jnp.zeros(x.shape, x.dtype).at[..., index].set(1)
    picked = quantized_dot(one, arrays, fmt, transposed, SMALL, interpret=True).astype(jnp.float32)
    assert (picked == (weight[:, index] if transposed else weight[index])).all()


def test_matrices_that_are_not_taken():
    """Other blocks and sizes, each with its reason."""
    assert unsupported_reason(linear_format("nf4", 4096, 14_336), 4096, 14_336) is None
    assert unsupported_reason(linear_format("int8", 4096, 1024), 4096, 1024) is None
    assert "blocks of 96 inputs" in str(unsupported_reason(linear_format("int8", 96, 128), 96, 128))
    assert "is 4160 × 128, not a multiple of 128 × 128" in str(
        unsupported_reason(Format("nf4", (64, 1), 128), 4160, 128)
    )
    assert "groups of 192 outputs" in str(unsupported_reason(linear_format("nf4", 128, 384), 128, 384))


@pytest.mark.parametrize("method", ["int8", "nf4"])
@pytest.mark.parametrize("transposed", [False, True])
def test_kernels_are_lowered_for_gpus(method, transposed):
    """What Triton has no form of is refused by the lowering."""
    fmt = linear_format(method, 4096, 1024)
    arrays = {
        name: jax.ShapeDtypeStruct(fmt.shape(name, (4096, 1024)), jnp.dtype(spec.dtype))
        for name, spec in fmt.array_specs().items()
    }
    x = jax.ShapeDtypeStruct((2, 512, 1024 if transposed else 4096), jnp.bfloat16)
    run = jax.jit(lambda x, arrays: quantized_dot(x, arrays, fmt, transposed))
    lowered = run.trace(x, arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count(f'name = "quantized_dot_{method}{"_transposed" if transposed else ""}"') == 1
