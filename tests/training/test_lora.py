"""The parameter split: what is trained, what is not, and that the program itself knows."""

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from kit import architecture, one_device

from sft_jax.adapters.attach import attach_adapters
from sft_jax.adapters.lora import LoRA
from sft_jax.config import OptimizerConfig
from sft_jax.errors import UserError
from sft_jax.models.decoder import Decoder
from sft_jax.models.layers import broadcast_like
from sft_jax.models.projection import Adapter, Product, project
from sft_jax.models.split import FROZEN, split_params
from sft_jax.sharding import make_mesh
from sft_jax.training.optimizer import labels_of, make_optimizer
from sft_jax.training.state import make_state, state_shardings
from sft_jax.training.step import make_train_step
from sft_jax.training.weights import form_on
from sft_jax.tree import flatten, unflatten
from sft_jax.typing import Batch

pytestmark = pytest.mark.smoke

# Every dimension is its own number, so that shapes in a compiled program tell what they are.
ARCH = architecture(211, 40, 104, 3, 4, 2, 12, False)
RANK = 6


def make(full=False, targets="all-linear", embeddings=False, dtype=jnp.float32, dropout=0.0, form="separate"):
    def network():
        model = Decoder(ARCH, jax.random.key(0), dtype)
        if not full:
            attach_adapters(model, LoRA(RANK, 12.0, dropout, form), targets)
        return model

    return split_params(nnx.eval_shape(network), make_mesh(devices=one_device()), full, embeddings)


def weights(split, seed=0):
    rng = np.random.default_rng(seed)

    def fill(leaf):
        return jax.device_put(jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, split.trainable), jax.tree.map(fill, split.frozen)


def batch(num_targets=None, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 211, (4, 17))
    mask = rng.random((4, 16)) < 0.5
    if num_targets == 0:
        mask[:] = False
    segments = np.ones((4, 16), np.int32)
    positions = np.broadcast_to(np.arange(16), (4, 16))
    fields = (ids[:, :-1], ids[:, 1:], mask, segments, positions)
    return Batch(*(jnp.asarray(x, bool if x.dtype == bool else jnp.int32) for x in fields))


def step_of(split, accumulation=1, dropout_key=None, **changes):
    settings = {"learning_rate": 1e-2, "warmup_ratio": 0.0, "schedule": "constant"} | changes
    optimizer = make_optimizer(OptimizerConfig(**settings), labels_of(split.trainable, split.labels))
    mesh = make_mesh(devices=one_device())
    shardings = state_shardings(split.trainable, optimizer, mesh)
    rate = settings["learning_rate"]
    step = make_train_step(split, optimizer, lambda _: jnp.float32(rate), accumulation, dropout_key, shardings)
    return step, lambda params: make_state(jax.tree.map(jnp.array, params), optimizer, mesh), optimizer


def test_every_leaf_has_one_label_and_the_right_dtype():
    split = make(dtype=jnp.bfloat16)
    trainable, frozen = flatten(split.trainable), flatten(split.frozen)
    assert split.labels.keys() == trainable.keys() | frozen.keys()
    assert not trainable.keys() & frozen.keys()
    assert {split.labels[path] for path in trainable} == {"lora_a", "lora_b"}
    assert {split.labels[path] for path in frozen} == {FROZEN}
    assert {leaf.dtype for leaf in trainable.values()} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in frozen.values()} == {jnp.dtype(jnp.bfloat16)}
    full = make(full=True)
    assert not full.frozen
    assert {full.labels[p] for p in full.labels if p[-2].endswith("norm")} == {"full_no_decay"}
    assert {full.labels[p] for p in full.labels if p[-2].endswith("_proj")} == {"full"}
    with_table = make(embeddings=True)
    assert {p for p, label in with_table.labels.items() if label == "full"} == {
        ("embed_tokens", "weight"),
        ("lm_head", "weight"),
    }


def test_targets():
    assert {p[-2] for p in flatten(make(targets=["q_proj", "mlp.up_proj"]).trainable)} == {"q_proj", "up_proj"}
    for target, words in (
        ("c_attn", "matches no linear layer; this model has down_proj"),
        ("lm_head", "not supported"),
    ):
        with pytest.raises(UserError, match=words):
            make(targets=["q_proj", target])


def test_a_fresh_adapter_changes_nothing_and_a_has_the_kaiming_bound():
    split = make()
    adapter = split.variant.initialize(split.adapter(), split.layers, jax.random.key(0), lambda path: None)
    for path, leaf in adapter.items():
        if path[-1] == "lora_b":
            assert not leaf.any()
        else:
            bound = leaf.shape[-2] ** -0.5
            assert 0.9 * bound < float(jnp.abs(leaf).max()) <= bound
            assert abs(float(leaf.std()) / (bound / np.sqrt(3)) - 1) < 0.15
    _, frozen = weights(split)
    data = batch()
    with_adapter = split.merge(unflatten(adapter), frozen)(data.inputs, data.segment_ids, data.positions)
    plain = make(full=True)
    without = plain.merge(frozen, {})(data.inputs, data.segment_ids, data.positions)
    assert np.array_equal(with_adapter, without)


def test_frozen_is_frozen():
    split = make(dtype=jnp.bfloat16)
    params, frozen = weights(split)
    before = jax.tree.map(np.asarray, frozen)
    step, init, _ = step_of(split, weight_decay=0.1)
    state = init(params)
    for i in range(5):
        given = state
        state, metrics = step(given, frozen, batch(seed=i))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))  # donated: its memory is used again
    assert jax.tree.all(jax.tree.map(np.array_equal, before, frozen))
    assert not jax.tree.all(jax.tree.map(np.array_equal, params, state.params))
    assert np.isfinite(metrics["loss"])
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_optimizer_leaves_frozen_leaves_alone_even_if_given_them():
    split = make()
    params, frozen = weights(split)
    everything = unflatten(flatten(params) | flatten(frozen))
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), split.labels)
    grads = jax.tree.map(jnp.ones_like, everything)
    state = optimizer.init(everything)
    updates, _ = jax.jit(optimizer.update)(grads, state, everything, learning_rate=jnp.float32(1.0))
    for path, update in flatten(updates).items():
        assert bool(update.any()) == (split.labels[path] != FROZEN)


def test_no_base_weight_gradient_in_the_program():
    """Gradients of base weights would be arrays of the weights' shapes that some product makes."""
    shapes = {
        f"{a},{b}" for a, b in ((40, 48), (48, 40), (40, 24), (24, 40), (40, 104), (104, 40), (40, 211), (211, 40))
    }

    def products(full):
        split = make(full=full)
        params, frozen = weights(split)
        step, init, _ = step_of(split)
        compiled = step.lower(init(params), frozen, batch()).compile()
        return [shape for shape in re.findall(r"= f32\[([\d,]+)\]\S* dot\(", compiled.as_text()) if shape in shapes]

    assert len(products(full=True)) == 8, products(full=True)  # of seven kernels and the head: the same look finds them
    assert products(full=False) == []


def test_no_base_weight_gradient_where_adapters_are_merged():
    """Products as large as a weight are then those of A and B, for each pass one, and none over positions."""
    split = make(form="merged")
    params, frozen = weights(split)
    step, init, _ = step_of(split)
    text = step.lower(init(params), frozen, batch()).as_text()
    products = re.findall(r"dot_general .*: \(tensor<(\S+)xf32>, tensor<(\S+)xf32>\) -> tensor<(\S+)xf32>", text)
    kernels = ["40x48", "40x24", "40x24", "48x40", "40x104", "40x104", "104x40"]
    expected = [(f"{a}x{RANK}", f"{RANK}x{b}", f"{a}x{b}") for a, b in (kernel.split("x") for kernel in kernels)]
    found = [one for one in products if one[-1] in {*kernels, "40x211", "211x40"}]
    assert set(found) == set(expected)
    assert len(found) == 2 * len(kernels)


@pytest.mark.parametrize("of_weights", [False, True])
@pytest.mark.parametrize("by_heads", [False, True])
@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("form", ["separate", "merged", "joined"])
def test_every_form_computes_the_same(form, num, by_heads, of_weights):
    """One weight, and three of one input, two with adapters of their own rank and scale: values, and each gradient."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    inputs, outputs = ((3, 4), ((5,), (2, 4), (8,))) if by_heads else ((12,), ((5,), (8,), (2, 4)))
    sizes = [math.prod(dims) for dims in outputs]
    x, weights, d_outs = normal(2, 9, 12), [normal(12, n) for n in sizes], [normal(2, 9, n) for n in sizes]
    adapters = [Adapter(normal(12, 3), normal(3, sizes[0])), None, Adapter(normal(12, 2), normal(2, sizes[2]))]
    scales = (2.0, 0.0, 0.5)[:num]
    outputs, weights, d_outs, adapters = outputs[:num], weights[:num], d_outs[:num], adapters[:num]

    def plainly(x, weights, adapters):
        return [
            x @ (weight if adapter is None else weight + scale * adapter.a @ adapter.b)
            for weight, adapter, scale in zip(weights, adapters, scales, strict=True)
        ]

    def by_project(x, weights, adapters):
        how = Product(inputs, outputs, scales, form)
        outs = project(x.reshape(2, 9, *inputs), weights, adapters, jnp.float32(0), how)
        assert [out.shape[2:] for out in outs] == list(outputs)
        return [out.reshape(2, 9, -1) for out in outs]

    def results(compute):
        given = (x, adapters, weights) if of_weights else (x, adapters)
        out, pullback = jax.vjp(lambda x, adapters, weights=weights: compute(x, weights, adapters), *given)
        return jax.tree.leaves((out, pullback(d_outs)))

    expected, found = results(plainly), results(by_project)
    assert len(found) == len(expected) == num + 1 + (4 if num == 3 else 2) + num * of_weights
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_form_of_adapters_by_platform():
    def form(platform, tensor=1, size=1, dtype="bfloat16", compute=None):
        device = SimpleNamespace(platform=platform)
        mesh = SimpleNamespace(devices=np.asarray([device]), shape={"tensor": tensor}, size=size)
        return form_on(mesh, dtype, compute)

    assert form("cpu", dtype="float32") == "merged"
    assert form("cpu", dtype="float32", compute="int8") == "separate"  # a merged adapter would be rounded
    assert form("cpu", dtype="float32", size=2) == form("cpu") == form("gpu") == "separate"
    assert form("tpu") == form("tpu", size=16, dtype="float32") == "joined"
    assert form("tpu", size=16, tensor=2) == "separate"


def test_all_masked_batch_changes_nothing():
    for full in (False, True):
        split = make(full=full)
        params, frozen = weights(split)
        step, init, _ = step_of(split, weight_decay=0.1)
        state, _ = step(init(params), frozen, batch())
        before = jax.tree.map(np.asarray, (state.params, state.opt_state))
        state, metrics = step(state, frozen, batch(num_targets=0))
        assert float(metrics["loss"]) == 0.0
        assert float(metrics["target_tokens"]) == 0.0
        assert jax.tree.all(jax.tree.map(np.array_equal, before, (state.params, state.opt_state)))
        assert int(state.step) == 2
        assert not bool(state.halted)


def test_not_finite_halts_before_any_harm():
    split = make()
    params, frozen = weights(split)
    step, init, _ = step_of(split)
    state, _ = step(init(params), frozen, batch())
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    broken = jax.tree.map(lambda x: x.at[..., 0].set(jnp.inf), frozen)
    state, metrics = step(state, broken, batch())
    assert not bool(metrics["finite"])
    state, _ = step(state, frozen, batch())  # started before the loss was looked at
    assert bool(state.halted)
    assert int(state.step) == 1
    assert jax.tree.all(jax.tree.map(np.array_equal, before, (state.params, state.opt_state)))


def test_dropout_is_on_the_adapter_input_only_and_differs_by_step():
    split = make(dropout=0.5)
    params, frozen = weights(split)
    data = batch()

    @jax.jit
    def hidden(params, key):
        return split.merge(params, frozen)(data.inputs, data.segment_ids, data.positions, key)

    keys = jax.random.split(jax.random.key(0), 2)
    assert not np.array_equal(hidden(params, keys[0]), hidden(params, keys[1]))
    assert np.array_equal(hidden(params, keys[0]), hidden(params, keys[0]))
    no_update = jax.tree.map(jnp.zeros_like, params)
    assert np.array_equal(hidden(no_update, keys[0]), hidden(no_update, None))
    step, init, _ = step_of(split, dropout_key=keys[0], learning_rate=0.0)
    state = init(params)
    state, first = step(state, frozen, data)
    _, second = step(state, frozen, data)
    assert float(first["loss"]) != float(second["loss"])


def test_gradients_of_thin_leaves_are_added_up_in_float32():
    """Of norms, biases, and adapters with dropout, over so many positions that bfloat16 sums would stand still."""
    rng = np.random.default_rng(0)
    x, d_out = (jnp.asarray(rng.normal(size=(2, 8192, 12)) + 1.0, jnp.bfloat16) for _ in range(2))
    exact = lambda a: np.asarray(a, np.float64).reshape(-1, 12)  # noqa: E731
    _, pullback = jax.vjp(lambda vector: broadcast_like(vector, x), jnp.ones(12))
    np.testing.assert_allclose(pullback(d_out)[0], exact(d_out).sum(0), rtol=1e-5)

    adapter = Adapter(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((12, 3), (3, 12))))
    how = Product((12,), ((12,),), (2.0,))
    out, pullback = jax.vjp(lambda adapter: project(x, [None], [adapter], jnp.float32(0), how)[0], adapter)
    (gradient,) = pullback(d_out)
    low = jnp.dot(x, adapter.a.astype(x.dtype)) * 2
    d_low = jnp.dot(d_out, adapter.b.astype(x.dtype).T) * 2
    assert np.array_equal(out, jnp.dot(low, adapter.b.astype(x.dtype)))
    np.testing.assert_allclose(gradient.b, np.asarray(low, np.float64).reshape(-1, 3).T @ exact(d_out), rtol=1e-5)
    np.testing.assert_allclose(gradient.a, exact(x).T @ np.asarray(d_low, np.float64).reshape(-1, 3), rtol=1e-4)


@pytest.mark.parametrize("full", [False, True])
def test_adamw_is_optax_adamw_and_the_clip_is_global(full):
    """On the same gradients, so that only the optimizer itself is compared; norms and biases are not decayed."""
    split = make(full=full)
    params, _ = weights(split)
    labels = labels_of(split.trainable, split.labels)
    ours = make_optimizer(OptimizerConfig(weight_decay=0.3, max_grad_norm=0.5), labels)
    decayed = unflatten({path: label != "full_no_decay" for path, label in labels.items()})
    theirs = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.3, mask=decayed))
    expected, state, reference = params, ours.init(params), theirs.init(params)

    @jax.jit
    def both(grads, params, state, expected, reference):
        with jax.numpy_dtype_promotion("standard"):
            updates, reference = theirs.update(grads, reference, expected)
        expected = optax.apply_updates(expected, updates)
        updates, state = ours.update(grads, state, params, learning_rate=jnp.float32(1e-2))
        return optax.apply_updates(params, updates), state, expected, reference

    for seed in range(4):
        params, state, expected, reference = both(weights(split, seed)[0], params, state, expected, reference)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), params, expected)


def test_schedules_are_optax_ones():
    from sft_jax.training.optimizer import make_schedule

    def rates(schedule):
        make_rate = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_ratio=0.1, schedule=schedule), 100)
        return np.array([make_rate(jnp.int32(i)) for i in range(100)])

    reference = optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 100)
    np.testing.assert_allclose(rates("cosine"), [reference(i) for i in range(100)], atol=1e-6)
    assert (rates("constant")[10:] == 1.0).all()
    np.testing.assert_allclose(rates("linear")[10:], 1 - np.arange(90) / 90, atol=1e-6)
    wsd = rates("wsd")
    assert (wsd[10:81] == 1.0).all()
    np.testing.assert_allclose(wsd[80:], 1 - np.arange(20) / 20, atol=1e-6)
    for name in ("constant", "linear", "cosine", "wsd"):
        np.testing.assert_allclose(rates(name)[:10], np.arange(10) / 10, atol=1e-6)
