"""The same data give the same update, however it is cut up: parts, packing, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from kit import architecture, make_tokenizer, one_device, write_jsonl

from sft_jax.adapters.attach import attach_adapters
from sft_jax.adapters.lora import LoRA
from sft_jax.config import OptimizerConfig, SourceConfig
from sft_jax.data.batches.loader import Loader
from sft_jax.data.batches.packing import plan_run
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens.examples import encode_sources
from sft_jax.models.architecture import Norm
from sft_jax.models.decoder import Decoder
from sft_jax.models.split import split_params
from sft_jax.sharding import make_mesh
from sft_jax.training.optimizer import labels_of, make_optimizer
from sft_jax.training.state import make_state, state_shardings
from sft_jax.training.step import make_train_step
from sft_jax.tree import flatten, unflatten

LENGTH = 64


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Sixteen completions of very unequal length, so that rows have very unequal target counts."""
    rows = [{"prompt": "river" * (1 + i % 3), "completion": " market" * (1 + (7 * i) % 40)} for i in range(16)]
    path = write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)
    encoded, _ = encode_sources(open_sources([SourceConfig(path=str(path))]), Encoder(make_tokenizer()), LENGTH)
    assert len(encoded) == 16
    return encoded


def update(examples, full, tied, mesh=None, parts=1, packing=False, windows=None):
    """Loss and new weights after one step on all examples; every weight is a fixed function of its place."""
    mesh = mesh or make_mesh(devices=one_device())
    vocab_size = len(make_tokenizer())
    arch = architecture(vocab_size, 32, 64, 2, 8, 2, 4, tied, qk_norm=Norm(1e-5), windows=windows)

    def network():
        model = Decoder(arch, jax.random.key(0), jnp.float32, "full")
        if not full:
            attach_adapters(model, LoRA(4, 8.0), "all-linear")
        return model

    split = split_params(nnx.eval_shape(network), mesh, full)
    rng = np.random.default_rng(0)
    numbers = {
        path: 0.2 * rng.normal(size=split_leaf.shape).astype(np.float32)
        for path, split_leaf in sorted((flatten(split.trainable) | flatten(split.frozen)).items())
    }

    def place(tree):
        leaves = flatten(tree)
        return unflatten({path: jax.device_put(numbers[path], leaf.sharding) for path, leaf in leaves.items()})

    # With eps = 1 the first update is nearly linear in the gradient, so that its error is the gradient's; with a huge
    # rate the new weights are the update, which is then not rounded to the precision of the old weights.
    config = OptimizerConfig(weight_decay=0.0, max_grad_norm=1.0, eps=1.0)
    optimizer = make_optimizer(config, labels_of(split.trainable, split.labels))
    shardings = state_shardings(split.trainable, optimizer, mesh)
    step = make_train_step(split, optimizer, lambda _: jnp.float32(1e4), parts, None, shardings)
    batch_size = 8 if packing else 16
    plan = plan_run(examples.num_tokens, LENGTH, batch_size, 1, packing=packing, shuffle=packing)
    assert plan.num_steps == 1
    with jax.set_mesh(mesh):
        batch = next(iter(Loader(examples, plan, mesh, batch_size)))
        before = place(split.trainable)
        state, metrics = step(make_state(before, optimizer, mesh), place(split.frozen), batch)
    for path, leaf in flatten(state.params).items():
        assert leaf.sharding.is_equivalent_to(flatten(split.trainable)[path].sharding, leaf.ndim)
    moved = {path: np.asarray(leaf) - numbers[path] for path, leaf in flatten(state.params).items()}
    return float(metrics["loss"]), float(metrics["grad_norm"]), moved


def assert_same(a, b):
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    assert a[1] == pytest.approx(b[1], rel=1e-5)
    assert a[2].keys() == b[2].keys()
    for path in a[2]:
        scale = np.abs(b[2][path]).max()
        assert scale > 0
        np.testing.assert_allclose(a[2][path], b[2][path], rtol=1e-5, atol=1e-5 * scale, err_msg=str(path))


@pytest.fixture(scope="module")
def references(examples):
    return {(full, tied): update(examples, full, tied) for full in (False, True) for tied in (False, True)}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation(examples, references, full, parts):
    assert_same(update(examples, full, True, parts=parts), references[full, True])


@pytest.mark.parametrize("full", [False, True])
def test_packing(examples, references, full):
    assert_same(update(examples, full, True, packing=True), references[full, True])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "sizes", [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 1, 8), pytest.param((2, 2, 1, 2), marks=pytest.mark.smoke)]
)
def test_devices(examples, references, full, sizes):
    tied = sizes != (2, 2, 1, 2)
    mesh = make_mesh(*sizes)
    parts = 1 if tied else 2
    assert_same(update(examples, full, tied, mesh, parts), references[full, tied])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("sizes", "tied"),
    [((1, 1, 8, 1), True), pytest.param((2, 1, 2, 2), False, marks=pytest.mark.smoke), ((1, 2, 4, 1), True)],
)
def test_devices_with_parts_of_rows(examples, references, full, sizes, tied):
    """Packed sequences with documents that cross the parts."""
    assert_same(update(examples, full, tied, make_mesh(*sizes), packing=True), references[full, tied])


def test_sliding_windows_in_parts_of_rows(examples, references):
    windows = (9, None)
    reference = update(examples, False, True, windows=windows)
    assert_same(update(examples, False, True, make_mesh(1, 2, 4, 1), packing=True, windows=windows), reference)
    assert reference[0] != pytest.approx(references[False, True][0], rel=3e-5)
