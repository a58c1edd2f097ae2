"""Products in eight bits: the numbers against slow references, the gradients, and what is stored."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kit import architecture, exchanged, make_model, one_device, run_config
from safetensors.numpy import load_file

from sft_jax.config import LoraConfig
from sft_jax.errors import UserError
from sft_jax.hf.config import read_architecture
from sft_jax.hf.reader import TensorReader
from sft_jax.models.eight_bit import FP8, INT8, check_device, product, rounded, rounded_outer, rounded_product
from sft_jax.models.projection import Adapter, Product, project
from sft_jax.models.quantize import dequantize, factor_format, quantize
from sft_jax.models.quantized import QuantizedMatrix
from sft_jax.sharding import make_mesh
from sft_jax.training.losses import batch_loss
from sft_jax.training.weights import build, load_weights
from sft_jax.tree import flatten
from sft_jax.typing import Batch

smoke = pytest.mark.smoke
KINDS = pytest.mark.parametrize("kind", [INT8, FP8], ids=lambda kind: kind.name)
LORA = LoraConfig(rank=4, alpha=8.0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def stored(weight, kind):
    fmt = factor_format(kind.name, *weight.shape)
    return QuantizedMatrix(quantize(jnp.asarray(weight), fmt), fmt)


def slow(x, dtype, axis):
    """Rounded to the format, in double precision: the values that codes and scales stand for."""
    largest = 127.0 if dtype == jnp.int8 else float(ml_dtypes.finfo(dtype).max)
    scale = np.abs(x.astype(np.float64)).max(axis=axis, keepdims=True) / largest
    quotients = x / np.where(scale > 0, scale, 1)
    codes = np.rint(quotients) if dtype == jnp.int8 else quotients.astype(np.float32).astype(dtype)
    return codes.astype(np.float64) * scale


@smoke
def test_the_example_of_the_module():
    x, weight = np.asarray([[0.5, -2.54, 1.0]], np.float32), np.asarray([[0.3], [0.1], [-1.27]], np.float32)
    matrix = stored(weight, INT8)
    codes, scales = rounded(jnp.asarray(x), jnp.int8, 1)
    assert codes.tolist() == [[25, -127, 50]]
    assert matrix.arrays["codes"].tolist() == [[30], [10], [-127]]
    np.testing.assert_allclose([scales[0, 0], matrix.arrays["scales"][0, 0]], [0.02, 0.01], rtol=1e-6)
    np.testing.assert_allclose(product(jnp.asarray(x), matrix, (3,), (1,)), [[-1.374]], rtol=1e-6)


@smoke
@KINDS
def test_products_are_those_of_the_rounded_factors(kind):
    x, weight, dy = normal(2, 9, 48), normal(48, 24, seed=1) ** 3, normal(2, 9, 24, seed=2)
    axis = -1 if kind.by_row else None
    by_column = slow(weight, kind.dtype, 0 if kind.by_row else None)
    expected = slow(x, kind.dtype, axis) @ by_column
    matrix = stored(weight, kind)
    np.testing.assert_allclose(product(jnp.asarray(x), matrix, (48,), (24,)), expected, rtol=1e-5, atol=1e-4)
    assert 0.001 < np.abs(expected - x @ weight).max() / np.abs(x @ weight).max() < 0.1

    # The scales of output channels multiply the gradient before it is rounded.
    scales = np.abs(weight).max(axis=0 if kind.by_row else None, keepdims=True) / (127 if kind == INT8 else 448)
    expected = slow(dy * scales, kind.gradient, axis) @ (by_column / scales).T
    np.testing.assert_allclose(product(jnp.asarray(dy), matrix, (48,), (24,), True), expected, rtol=1e-5, atol=1e-4)


@smoke
def test_trained_weights_and_their_gradients_are_rounded_too():
    x, weight, dy = normal(2, 9, 48), normal(48, 24, seed=1), normal(2, 9, 24, seed=2)
    rough = {"x": slow(x, FP8.dtype, None), "w": slow(weight, FP8.dtype, None), "dy": slow(dy, FP8.gradient, None)}
    how = Product((48,), ((24,),), (0.0,), compute=FP8)
    out, pullback = jax.vjp(
        lambda x, w: project(x, [w], [None], jnp.float32(0), how)[0], *map(jnp.asarray, (x, weight))
    )
    d_x, d_weight = pullback(jnp.asarray(dy))
    np.testing.assert_allclose(out, rough["x"] @ rough["w"], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(d_x, rough["dy"] @ rough["w"].T, rtol=1e-5, atol=1e-4)
    expected = rough["x"].reshape(-1, 48).T @ rough["dy"].reshape(-1, 24)
    np.testing.assert_allclose(d_weight, expected, rtol=1e-5, atol=1e-4)
    assert np.array_equal(out, rounded_product(jnp.asarray(x), jnp.asarray(weight), FP8, (48,), (24,)))
    assert np.array_equal(d_weight, rounded_outer(jnp.asarray(x), jnp.asarray(dy), FP8))


@smoke
@KINDS
def test_zeros_and_the_largest_values_stay(kind):
    x = jnp.zeros((3, 4)).at[1, 2].set(1e30)
    codes, scales = rounded(x, kind.dtype, 1 if kind.by_row else None)
    values = np.asarray(codes, np.float32) * np.asarray(scales)
    np.testing.assert_allclose(values, x, rtol=1e-6)
    weight = np.zeros((8, 4), np.float32)
    out = product(normal(2, 8), stored(weight, kind), (8,), (4,))
    assert np.array_equal(out, np.zeros((2, 4)))


@smoke
@KINDS
@pytest.mark.parametrize("by_heads", [False, True])
def test_adapters_are_not_rounded(kind, by_heads):
    """The adapter's term and its gradients are those beside a plain weight; the input's gradient has both."""
    inputs, outputs = ((3, 16), (2, 12)) if by_heads else ((48,), (24,))
    x, dy, weight = normal(2, 9, *inputs), normal(2, 9, *outputs, seed=2), normal(48, 24, seed=1)
    adapter = Adapter(jnp.asarray(normal(48, 3, seed=3)), jnp.asarray(normal(3, 24, seed=4)))

    def results(weight, form):
        how = Product(inputs, (outputs,), (2.0,), form)
        run = lambda x, adapter: project(x, [weight], [adapter], jnp.float32(0), how)[0]  # noqa: E731
        out, pullback = jax.vjp(run, jnp.asarray(x), adapter)
        return out, *pullback(jnp.asarray(dy))

    matrix = stored(weight, kind)
    base = product(x.reshape(2, 9, 48), matrix, (48,), (24,)).reshape(2, 9, *outputs)
    d_base = product(dy.reshape(2, 9, 24), matrix, (48,), (24,), True).reshape(2, 9, *inputs)
    expected_out, expected_d_x, expected = results(jnp.zeros_like(weight), "separate")
    for form in ("separate", "joined"):
        out, d_x, gradient = results(matrix, form)
        np.testing.assert_allclose(out, base + expected_out, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(d_x, d_base + expected_d_x, rtol=1e-5, atol=1e-4)
        for one, other in zip(gradient, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@smoke
@KINDS
def test_outliers_are_not_rounded_to_int8(kind):
    """Only the weight and the gradient are; FP8, whose codes are floating-point numbers, rounds outliers as well."""
    x, dy, weight = normal(2, 9, 48), normal(2, 9, 24, seed=2), normal(48, 24, seed=1)
    x[..., 5] *= 300
    matrix, how = stored(weight, kind), Product((48,), ((24,),), (0.0,), compute=kind, has_outliers=True)
    out, pullback = jax.vjp(lambda x: project(x, [matrix], [None], jnp.float32(0), how)[0], jnp.asarray(x))
    exactly = x @ np.asarray(dequantize(matrix.arrays, matrix.fmt, jnp.float32))
    expected = product(x, matrix, (48,), (24,)) if kind is FP8 else exactly
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(product(x, matrix, (48,), (24,)) - exactly).max() > 1
    np.testing.assert_allclose(pullback(dy)[0], product(dy, matrix, (48,), (24,), True), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("eight") / "base", hidden_size=192, intermediate_size=320, head_dim=48)


def load(base, mesh, compute, lora=LORA):
    split = build(read_architecture(base), mesh, lora, "float32", compute=compute)
    return split, *load_weights(split, TensorReader(base), lora)


@KINDS
def test_the_frozen_base_is_stored_in_eight_bits_on_any_mesh(base, kind):
    split, _, frozen = load(base, make_mesh(devices=one_device()), kind.name)
    one, tensors = flatten(frozen), load_file(base / "model.safetensors")
    assert {path[-2] for path in split.quantized} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    for path, leaf in split.quantized.items():
        names = [f"model.layers.{i}.{'.'.join(path[2:-1])}.weight" for i in range(3)]
        weights = np.stack([tensors[name].T for name in names])
        arrays = {name: one[(*path, name)] for name in leaf.arrays}
        assert arrays["codes"].dtype == kind.dtype
        assert arrays["scales"].shape == (3, 1, weights.shape[-1] if kind == INT8 else 1)
        values = np.asarray(dequantize(arrays, leaf.fmt, jnp.float32))
        expected = np.stack([slow(weight, kind.dtype, 0 if kind == INT8 else None) for weight in weights])
        assert np.mean(np.abs(values - expected) > 1e-5 * np.abs(expected) + 1e-7) < 1e-4  # ties in double precision
    for sizes in ((2, 2, 1, 2), (1, 8, 1, 1)):
        _, _, other = load(base, make_mesh(*sizes), kind.name)
        for path, leaf in flatten(other).items():
            assert np.array_equal(leaf, one[path]), path


def batch_of(rows, length):
    ids = np.random.default_rng(0).integers(0, 200, (rows, length + 1))
    ones, positions = np.ones((rows, length), np.int32), np.arange(length) + 0 * ids[:, 1:]
    fields = (ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, positions)
    return Batch(*(jnp.asarray(x, jnp.float32 if x.dtype == np.float32 else jnp.int32) for x in fields))


@KINDS
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 4, 1, 2), (1, 2, 2, 2)])
def test_a_model_computes_almost_the_same(base, kind, sizes):
    """Its loss is within 1 % of the plain one, on every mesh; random weights amplify the errors of gradients."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])

    def results(compute, mesh=mesh):
        split, params, frozen = load(base, mesh, compute)
        params = jax.tree.map(lambda leaf: jax.device_put(0.1 * normal(*leaf.shape), leaf.sharding), params)

        def loss(params, frozen, batch):
            return batch_loss(split.merge(params, frozen), batch)["loss"]

        with jax.set_mesh(mesh):
            return jax.jit(jax.value_and_grad(loss))(params, frozen, batch_of(8, 32))

    (plain, plain_grads), (loss, grads) = results(None), results(kind.name)
    assert 1e-6 < abs(float(loss / plain) - 1) < 0.01
    one_loss, _ = results(kind.name, make_mesh(devices=one_device()))
    np.testing.assert_allclose(loss, one_loss, rtol=5e-3)  # another order of sums rounds elsewhere
    for path, gradient in flatten(plain_grads).items():
        other = np.asarray(flatten(grads)[path])
        bound = 0.25 if kind == INT8 else 0.6
        assert 0 < np.linalg.norm(other - gradient) < bound * np.linalg.norm(gradient), path


def test_codes_are_gathered_and_not_weights(base):
    mesh = make_mesh(1, 4, 1, 1, devices=jax.devices()[:4])
    split, params, frozen = load(base, mesh, "int8")

    def loss(params, frozen, batch):
        return batch_loss(split.merge(params, frozen), batch)["loss"]

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss)).lower(params, frozen, batch_of(8, 16)).compile().as_text()
    gathered = exchanged(program, "all-gather")
    assert ("s8", (1, 192, 320)) in gathered or ("s8", (192, 320)) in gathered
    assert not {shape for dtype, shape in gathered if dtype == "f32" and shape[-2:] == (192, 320)}


@smoke
def test_full_fine_tuning_keeps_its_weights_and_rounds_products():
    arch = architecture(211, 40, 104, 3, 4, 2, 12, False)
    mesh = make_mesh(devices=one_device())
    plain, rough = (build(arch, mesh, None, "float32", compute=compute) for compute in (None, "fp8"))
    assert not rough.quantized
    assert flatten(rough.trainable).keys() == flatten(plain.trainable).keys()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), plain.trainable)

    def gradients(split):
        return jax.jit(jax.value_and_grad(lambda params: batch_loss(split.merge(params, {}), batch_of(4, 16))["loss"]))(
            params
        )

    (loss, grads), (rough_loss, rough_grads) = gradients(plain), gradients(rough)
    assert 1e-6 < abs(float(rough_loss / loss) - 1) < 0.05
    for path, gradient in flatten(grads).items():
        other = np.asarray(flatten(rough_grads)[path])
        assert 0 < np.linalg.norm(other - gradient) < 0.3 * np.linalg.norm(gradient), path


@smoke
def test_refusals():
    for changes, words in (
        ({"model__compute": "int4"}, "model.compute: 'int4' is not one of int8, fp8"),
        ({"model__compute": "int8", "lora": None}, "model.compute: int8 is for a frozen base; set lora, or .*fp8"),
        ({"model__compute": "fp8", "model__quantization": "nf4"}, "model.compute: stores the frozen base in fp8 alre"),
    ):
        with pytest.raises(UserError, match=words):
            run_config("model", **changes)
    device = lambda platform, kind, capability=None: SimpleNamespace(  # noqa: E731
        platform=platform, device_kind=kind, compute_capability=capability
    )
    for name, one, words in (
        ("fp8", device("gpu", "NVIDIA A100", "8.0"), "NVIDIA A100 does not multiply FP8; an H100, .* use null$"),
        ("fp8", device("tpu", "TPU v5 lite"), "TPU v5 lite does not multiply FP8; .* use null or int8"),
        ("int8", device("tpu", "TPU v4"), "TPU v4 multiplies int8 no faster than bfloat16"),
    ):
        with pytest.raises(UserError, match=words):
            check_device(name, one)
    for name, one in (
        ("fp8", device("gpu", "NVIDIA H100", "9.0")),
        ("fp8", device("gpu", "an abstract GPU")),
        ("fp8", device("tpu", "TPU7x")),
        ("int8", device("tpu", "TPU v5 lite")),
        ("int8", device("tpu", "TPU v6 lite")),
        ("int8", device("gpu", "NVIDIA A100", "8.0")),
        ("fp8", device("cpu", "cpu")),
    ):
        check_device(name, one)
