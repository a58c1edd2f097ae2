"""Weights in 4 and 8 bits: the numbers against slow references, what is read from files, and the gradients."""

import math
import re
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kit import architecture, exchanged, make_model, one_device, run_config
from safetensors.numpy import load_file

from sft_jax.config import LoraConfig
from sft_jax.errors import UserError
from sft_jax.hf.config import read_architecture
from sft_jax.hf.reader import TensorReader
from sft_jax.models.quantize import NF4_LEVELS, dequantize, linear_format, quantize, vocab_format
from sft_jax.models.split import FROZEN
from sft_jax.sharding import make_mesh
from sft_jax.training.losses import batch_loss
from sft_jax.training.weights import build, load_weights
from sft_jax.tree import flatten, unflatten
from sft_jax.typing import Batch

smoke = pytest.mark.smoke
METHODS = pytest.mark.parametrize("method", ["nf4", "int8"])
LORA = LoraConfig(rank=4, alpha=8.0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def there_and_back(weight, fmt, dtype=jnp.float32):
    return np.asarray(dequantize(quantize(jnp.asarray(weight), fmt), fmt, dtype))


def slow_nf4(weight, block):
    """Codes and absmax value by value, in double precision."""
    rows, columns = weight.shape
    codes, absmax = np.zeros(weight.shape, int), np.zeros((rows // block, columns))
    for b in range(rows // block):
        for c in range(columns):
            values = weight[b * block : (b + 1) * block, c].astype(np.float64)
            absmax[b, c] = np.abs(values).max()
            for i, value in enumerate(values):
                distances = [abs(value / absmax[b, c] - level) for level in NF4_LEVELS]
                codes[b * block + i, c] = int(np.argmin(distances))
    return codes, absmax


@smoke
def test_levels_are_the_published_quantiles():
    """QLoRA, appendix E: the outermost quantile is halfway between those of 15 and 16 bins."""
    outermost, quantile = 1 - (1 / 30 + 1 / 32) / 2, NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    levels = np.array(sorted([*above, *below, 0.0]))
    np.testing.assert_allclose(NF4_LEVELS, levels / levels.max(), atol=2e-7)


@smoke
def test_the_worked_example():
    fmt = linear_format("nf4", 4, 1)
    arrays = quantize(jnp.asarray([[0.30], [-1.50], [0.75], [0.05]]), fmt)
    assert arrays["codes"].ravel().tolist() == [9 + 16 * 12, 0 + 16 * 7]
    np.testing.assert_allclose(dequantize(arrays, fmt, jnp.float32).ravel(), [0.24, -1.5, 0.66, 0.0], atol=5e-3)


@smoke
@pytest.mark.parametrize(("shape", "block"), [((128, 512), 64), ((112, 36), 56), ((48, 7), 48)])
def test_nf4_against_a_slow_reference(shape, block):
    weight, fmt = normal(*shape), linear_format("nf4", *shape)
    assert fmt.block == (block, 1)
    arrays = {name: np.asarray(x) for name, x in quantize(jnp.asarray(weight), fmt).items()}
    codes, absmax = slow_nf4(weight, block)
    halves = arrays["codes"].reshape(shape[0] // block, block // 2, shape[1])
    ours = np.concatenate([halves & 15, halves >> 4], axis=1).reshape(shape)
    assert np.array_equal(ours, codes)
    steps = np.repeat(arrays["scale_step"], fmt.scale_block, axis=1)
    scales = np.repeat(arrays["scale_offset"], fmt.scale_block, axis=1) + arrays["scales"] * steps
    assert (np.abs(scales - absmax) <= steps / 2 + 1e-6).all()
    expected = np.asarray(NF4_LEVELS)[codes] * np.repeat(scales, block, axis=0)
    np.testing.assert_allclose(dequantize(arrays, fmt, jnp.float32), expected, rtol=1e-6, atol=1e-7)


@smoke
def test_int8_against_a_slow_reference():
    weight, fmt = normal(256, 12), linear_format("int8", 256, 12)
    arrays = quantize(jnp.asarray(weight), fmt)
    blocks = weight.reshape(2, 128, 12).astype(np.float64)
    scales = np.abs(blocks).max(axis=1) / 127
    np.testing.assert_allclose(arrays["scales"], scales, rtol=1e-6)
    assert np.array_equal(arrays["codes"], np.rint(blocks / scales[:, None]).reshape(256, 12))


@smoke
def test_error_bounds():
    weight = normal(512, 512)
    nf4, int8 = (there_and_back(weight, linear_format(method, 512, 512)) - weight for method in ("nf4", "int8"))
    absmax = np.repeat(np.abs(weight.reshape(8, 64, 512)).max(axis=1), 64, axis=0)
    half_gap = max(np.diff(NF4_LEVELS)) / 2  # between -1 and the level after it
    of_scale = np.ptp(absmax) / 255 / 2
    assert (np.abs(nf4) <= absmax * half_gap + of_scale + 1e-6).all()
    assert 0.06 < np.sqrt(np.mean(nf4**2)) < 0.1  # of a standard deviation
    assert (np.abs(int8) <= np.repeat(np.abs(weight.reshape(4, 128, 512)).max(axis=1), 128, axis=0) / 253).all()


@smoke
def test_what_a_format_can_express_survives_exactly():
    rng = np.random.default_rng(0)
    levels = np.asarray(NF4_LEVELS, np.float32)[rng.integers(0, 16, (128, 512))]
    levels[::64] = 1.0
    scales = 2.0 ** rng.integers(-4, 4, (2, 2))  # one for each block of scales
    weight = (levels.reshape(2, 64, 2, 256) * scales[:, None, :, None]).reshape(128, 512).astype(np.float32)
    assert np.array_equal(there_and_back(weight, linear_format("nf4", 128, 512)), weight)
    numbers = rng.integers(-127, 128, (256, 40)).astype(np.float32)
    numbers[::128] = 127
    assert np.array_equal(there_and_back(numbers / 64, linear_format("int8", 256, 40)), numbers / 64)
    for method in ("nf4", "int8"):
        assert not there_and_back(np.zeros((128, 8), np.float32), linear_format(method, 128, 8)).any()
    fmt = linear_format("nf4", 128, 512)
    once = there_and_back(weight, fmt, jnp.bfloat16)
    assert once.dtype == jnp.bfloat16
    assert np.array_equal(once, weight.astype(jnp.bfloat16))


LLAMA_3_8B = architecture(128256, 4096, 14336, 32, 32, 8, 128, False)


@smoke
@pytest.mark.parametrize(("method", "most"), [("nf4", 0.30), ("int8", 0.52)])
def test_llama_3_8b_shrinks_as_promised(method, most):
    """From shapes alone; what differs between bases of 8 billion weights is nothing else."""
    split = build(LLAMA_3_8B, make_mesh(devices=one_device()), LORA, "bfloat16", quantization=method)
    leaves = flatten(split.frozen)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
    weights = sum(leaf.size for path, leaf in split.base().items())
    assert weights == 8_030_261_248
    assert most - 0.02 < size / (2 * weights) <= most
    assert {split.labels[path] for path in leaves} == {FROZEN}
    norms = {leaf.dtype for path, leaf in leaves.items() if path[-2].endswith("norm")}
    assert norms == {jnp.dtype(jnp.bfloat16)}


def load(base, method, mesh, lora=LORA, embeddings=False):
    arch = read_architecture(base)
    split = build(arch, mesh, lora, "float32", "full", embeddings, quantization=method)
    return split, *load_weights(split, TensorReader(base), lora)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """Dimensions of several blocks, which shards of eight devices cut through."""
    folder = tmp_path_factory.mktemp("untied") / "base"
    return make_model(folder, hidden_size=192, intermediate_size=320, head_dim=48, tie_word_embeddings=False)


@METHODS
def test_loading_does_not_depend_on_the_mesh(untied, method):
    split, _, frozen = load(untied, method, make_mesh(devices=one_device()))
    one = flatten(frozen)
    tensors = load_file(untied / "model.safetensors")
    for path, leaf in split.quantized.items():
        arrays = {name: one[(*path, name)] for name in leaf.arrays}
        name = ".".join(path[2:-1])
        files = [f"model.layers.{i}.{name}.weight" for i in range(3)] if path[0] == "layers" else [f"{path[0]}.weight"]
        files = ["model.embed_tokens.weight"] if path[0] == "embed_tokens" else files
        weights = np.stack([tensors[file] if path[0] == "embed_tokens" else tensors[file].T for file in files])
        weights = weights if path[0] == "layers" else weights[0]
        assert leaf.shape == weights.shape
        bound = 0.16 if path[0] == "layers" and method == "nf4" else 0.005
        error = np.abs(np.asarray(dequantize(arrays, leaf.fmt, jnp.float32)) - weights).max()
        assert 0 < error < bound * np.abs(weights).max()
    for sizes in ((2, 2, 1, 2), (1, 8, 1, 1), (1, 2, 2, 2)):
        other_split, _, other = load(untied, method, make_mesh(*sizes))
        for path, leaf in flatten(other).items():
            assert np.array_equal(leaf, one[path]), path
            assert leaf.dtype == one[path].dtype
            assert leaf.sharding == flatten(other_split.frozen)[path].sharding
        codes = flatten(other)["layers", "0", "self_attn", "q_proj", "weight", "codes"]
        assert codes.addressable_shards[0].data.size * np.prod(sizes[1:]) == codes.size


@METHODS
@pytest.mark.parametrize("remat", ["full", "none"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_the_dequantized_weights(method, remat, tied):
    arch = architecture(211, 40, 104, 3, 4, 2, 12, tied)
    mesh = make_mesh(devices=one_device())
    split = build(arch, mesh, LORA, "float32", remat, quantization=method)
    plain = build(arch, mesh, LORA, "float32", remat)
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), split.trainable)
    weights = {path: 0.2 * rng.normal(size=x.shape).astype(np.float32) for path, x in flatten(plain.frozen).items()}
    frozen = {}
    for path, weight in weights.items():
        if path in split.quantized:
            leaf = split.quantized[path]
            layers = weight if path[0] == "layers" else weight[None]
            made = jax.tree.map(lambda *parts: jnp.stack(parts), *(leaf.made(jnp.asarray(layer)) for layer in layers))
            made = made if path[0] == "layers" else jax.tree.map(lambda x: x[0], made)
            weights[path] = np.asarray(dequantize(made, leaf.fmt, jnp.float32))
            frozen |= {(*path, name): array for name, array in made.items()}
        else:
            frozen[path] = weight
    ids = rng.integers(0, 211, (4, 17))
    fields = (
        ids[:, :-1],
        ids[:, 1:],
        np.ones((4, 16), np.float32),
        np.ones((4, 16), int),
        np.arange(16) + 0 * ids[:, 1:],
    )
    batch = Batch(*(jnp.asarray(x, jnp.float32 if x.dtype == np.float32 else jnp.int32) for x in fields))

    def gradients(split, frozen):
        def loss(adapter, frozen, batch):
            return batch_loss(split.merge(adapter, frozen), batch)["loss"]

        compiled = jax.jit(jax.value_and_grad(loss)).lower(adapter, frozen, batch).compile()
        return compiled(adapter, frozen, batch), compiled.as_text()

    (loss, ours), program = gradients(split, unflatten(frozen))
    (expected_loss, expected), _ = gradients(plain, unflatten(weights))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for path, gradient in flatten(expected).items():
        scale = np.abs(gradient).max()
        assert scale > 0
        np.testing.assert_allclose(flatten(ours)[path], gradient, rtol=1e-5, atol=1e-5 * scale, err_msg=str(path))
    kernels = {f"3,{a},{b}" for a, b in ((40, 48), (48, 40), (40, 24), (40, 104), (104, 40))}
    assert not set(re.findall(r"f32\[([\d,]+)\]", program)) & kernels  # all layers' weights never exist together


def test_codes_are_gathered_and_not_weights(untied):
    """What devices trade under fsdp is a quarter or an eighth of the bytes."""
    mesh = make_mesh(1, 4, 1, 2)
    split, adapter, frozen = load(untied, "nf4", mesh)
    ids = jnp.zeros((8, 16), jnp.int32)

    def loss(adapter, frozen, ids):
        return batch_loss(split.merge(adapter, frozen), Batch(ids, ids, jnp.ones(ids.shape), ids + 1, ids))["loss"]

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss)).lower(adapter, frozen, ids).compile().as_text()
    gathered = exchanged(program, "all-gather")
    assert ("u8", (1, 96, 160)) in gathered  # up_proj: half of 192 inputs, 320 outputs over two devices
    floats = [math.prod(shape) for dtype, shape in gathered if dtype in ("f32", "bf16")]
    assert max(floats) < 192 * 48  # adapters, and hidden states of the loss; a device's part of k_proj would be that


@smoke
def test_refusals():
    for changes, words in (
        ({"lora": None, "model__quantization": "nf4"}, "model.quantization: only a frozen base"),
        ({"model__quantization": "fp4"}, "model.quantization: 'fp4' is not one of int8, nf4"),
        ({"model__quantization": "int8", "model__init": "random"}, "model.quantization: .*random weights are trained"),
    ):
        with pytest.raises(UserError, match=words):
            run_config("model", **changes)
    with pytest.raises(UserError, match="an odd number; use int8"):
        linear_format("nf4", 41, 8)
    assert vocab_format((10, 6), 0).block == (1, 6)
    assert vocab_format((6, 10), 1).block == (6, 1)
