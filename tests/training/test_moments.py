"""Moments and weights in less memory: what is rounded stays right on average, everything else stays what it was."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from kit import architecture, losses, make_model, one_device, run_config, trained_leaves
from safetensors.numpy import load_file, save_file

from sft_jax.assembly import open_model
from sft_jax.config import OptimizerConfig, SourceConfig
from sft_jax.models.quantized import embedding_lookup
from sft_jax.run.export import export
from sft_jax.run.train import train
from sft_jax.sharding import make_mesh, named_sharding
from sft_jax.training.moments import Factored, Rounded, scale_by_factored_adam, scale_by_rounded_adam
from sft_jax.training.optimizer import labels_of, make_optimizer
from sft_jax.training.rounding import apply_updates, random_words, stochastic_round
from sft_jax.training.state import abstract_state, make_state, state_shardings
from sft_jax.training.step import make_train_step
from sft_jax.training.weights import build
from sft_jax.tree import flatten
from sft_jax.typing import Batch

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


# -- on a mesh --------------------------------------------------------------------------------------------------------

ARCH = architecture(256, 64, 96, 2, 8, 2, 8, False)


def network(mesh, param_dtype="bfloat16", lora=None, dtype="float32"):
    return build(ARCH, mesh, lora, dtype, param_dtype=param_dtype)


def filled(split, scale, seed=0):
    """The same numbers on every mesh."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.device_put(jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), leaf.sharding), split
    )


def moved(mesh, moments):
    """Weights and optimizer state after three updates with given gradients."""
    split = network(mesh)
    optimizer = make_optimizer(OptimizerConfig(moments=moments), split.labels)
    shardings = state_shardings(split.trainable, optimizer, mesh)
    state = make_state(filled(split.trainable, 1.0), optimizer, mesh)

    def update(grads, params, opt_state, step):
        updates, opt_state = optimizer.update(grads, opt_state, params, learning_rate=jnp.float32(1e-3))
        return apply_updates(params, updates, jax.random.fold_in(KEY, step)), opt_state

    jitted = jax.jit(update, out_shardings=(shardings.params, shardings.opt_state))
    params, opt_state = state.params, state.opt_state
    for i in range(3):
        params, opt_state = jitted(filled(split.trainable, 0.01, 10 + i), params, opt_state, jnp.int32(i))
    return params, opt_state, jitted.lower(params, params, opt_state, jnp.int32(0))


@pytest.mark.parametrize("moments", ["bfloat16", "factored"])
@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2)])
def test_the_same_bits_on_every_mesh(moments, sizes):
    """What differs is the order in which squares are added up: for clipping, and for rows and columns."""
    alone, _, _ = moved(make_mesh(devices=one_device()), moments)
    spread, state, lowered = moved(make_mesh(*sizes), moments)
    differing = total = 0
    for path, leaf in flatten(spread).items():
        one, many = bits(flatten(alone)[path]), bits(leaf)
        differing, total = differing + np.count_nonzero(one != many), total + one.size
        assert not leaf.sharding.is_fully_replicated or leaf.ndim == 1 or path[-2].endswith("norm")
    assert differing <= 1e-3 * total
    assert len(jax.tree.leaves(state)) > 10
    # No device makes random words, or anything else, for all of a weight.
    text = lowered.compile().as_text()
    for path in (("layers", "0", "mlp", "up_proj", "weight"), ("embed_tokens", "weight")):
        leaf = flatten(spread)[path]
        own = leaf.addressable_shards[0].data.shape
        assert f"[{','.join(map(str, own))}]" in text
        assert f"[{','.join(map(str, leaf.shape))}]" not in text


@pytest.mark.smoke
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "factored"])
def test_what_is_kept_lives_where_its_weight_does(moments):
    mesh = make_mesh(1, 2, 2, 2)
    split = network(mesh)
    labels = labels_of(split.trainable, split.labels)
    optimizer = make_optimizer(OptimizerConfig(moments=moments), labels)
    state = make_state(filled(split.trainable, 1.0), optimizer, mesh)
    inner = next(part for part in state.opt_state if hasattr(part, "inner_states")).inner_states
    kept, plain = inner["full"].inner_state[0], inner["full_no_decay"].inner_state[0]
    assert isinstance(kept, {"float32": optax.ScaleByAdamState, "bfloat16": Rounded, "factored": Factored}[moments])
    assert isinstance(plain, optax.ScaleByAdamState if moments == "float32" else Rounded)  # vectors are not factored
    weight = flatten(split.trainable)[
        "layers", "0", "mlp", "up_proj", "weight"
    ]  # [L, in over fsdp × sequence, out over tensor]
    dtype = jnp.float32 if moments == "float32" else jnp.bfloat16  # whatever the weights are

    def at(tree):
        return tree["layers"]["0"]["mlp"]["up_proj"]["weight"]

    for leaf in [at(kept.mu)] if moments == "factored" else [at(kept.mu), at(kept.nu)]:
        assert leaf.sharding == weight.sharding
        assert leaf.dtype == dtype
    if moments == "factored":
        assert at(kept.rows).sharding.is_equivalent_to(named_sharding(mesh, ("embed", "norm"), (2, 64, 1)), 3)
        assert at(kept.columns).sharding.is_equivalent_to(named_sharding(mesh, ("norm", "mlp"), (2, 1, 96)), 3)
    abstract = abstract_state(split.trainable, optimizer, mesh)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), abstract, state)
    assert all(jax.tree.leaves(same))


def batch_of(rows, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 256, (rows, 17))
    fields = (ids[:, :-1], ids[:, 1:], np.ones((rows, 16)), np.ones((rows, 16)), np.arange(16) + np.zeros((rows, 1)))
    return Batch(*(jnp.asarray(x, dtype) for x, dtype in zip(fields, "iifii", strict=True)))


def stepped(mesh, parts=1, dtype="float32", param_dtype="bfloat16", steps=1):
    split = network(mesh, param_dtype, dtype=dtype)
    moments = "float32" if param_dtype == "float32" else "bfloat16"
    optimizer = make_optimizer(OptimizerConfig(moments=moments), split.labels)
    shardings = state_shardings(split.trainable, optimizer, mesh)
    step = make_train_step(split, optimizer, lambda _: jnp.float32(1e-3), parts, None, shardings, rounding_key=KEY)
    with jax.set_mesh(mesh):
        state = make_state(filled(split.trainable, 0.1), optimizer, mesh)
        for _ in range(steps):
            state, metrics = step(state, {}, batch_of(16))
        return step, state, {key: float(metrics[key]) for key in ("loss", "grad_norm")}


def test_a_step_is_the_same_on_every_mesh():
    _, alone, metrics = stepped(make_mesh(devices=one_device()))
    for sizes, parts in (((1, 8, 1, 1), 1), ((2, 1, 2, 2), 2)):
        _, spread, others = stepped(make_mesh(*sizes), parts)
        assert others["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
        assert others["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-3)
        for a, b in zip(jax.tree.leaves(spread.params), jax.tree.leaves(alone.params), strict=True):
            assert relative(a.astype(jnp.float32), b.astype(jnp.float32)) < 1e-3


def test_parts_of_a_batch_are_added_up_in_float32():
    step, state, _ = stepped(make_mesh(devices=one_device()), parts=4)
    jaxpr = jax.make_jaxpr(step)(state, {}, batch_of(16))

    def scans(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "scan" and eqn.params["length"] == 4:
                yield eqn
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from scans(inner)

    carried = [x.aval for x in next(scans(jaxpr.jaxpr)).outvars]  # the loop stacks nothing: all it gives was carried
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    assert shapes <= {aval.shape for aval in carried}
    assert {aval.dtype for aval in carried} == {jnp.dtype(jnp.float32)}


def test_a_frequent_token_keeps_its_gradient():
    """4096 gradients of 1/64 in one row: in bfloat16 the sum would stop at 4."""

    class Table:
        def __getitem__(self, _):
            return self.array

    def loss(array):
        table = Table()
        table.array = array
        return jnp.sum(embedding_lookup(table, jnp.zeros((1, 4096), jnp.int32), jnp.bfloat16) * jnp.bfloat16(1 / 64))

    gradient = jax.grad(lambda array: loss(array).astype(jnp.float32))(jnp.ones((3, 2), jnp.bfloat16))
    assert np.array_equal(gradient.astype(jnp.float32), [[64.0, 64.0], [0, 0], [0, 0]])


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", ["bfloat16", "factored"])
def test_a_continued_run_is_the_undisturbed_one(tiny, chats, tmp_path, moments):
    run = tmp_path / "run"
    settings = LOW | {"optimizer__moments": moments, "training__save_every": 3, "training__max_steps": 6, "lora": None}
    config = run_config(tiny, chats, run, **settings)
    train(config, one_device())
    whole, before = trained_leaves(run), losses(run)
    assert {leaf.dtype for leaf in whole.values()} == {np.dtype(ml_dtypes.bfloat16)}
    shutil.rmtree(run / "checkpoints" / "6")
    train(config, one_device())
    assert losses(run) == before
    assert all(np.array_equal(bits(whole[path]), bits(leaf)) for path, leaf in trained_leaves(run).items())


def test_bfloat16_weights_in_and_out(chats, tmp_path):
    """Byte-equal after no step; after some the run opens, answers, is evaluated, and exports what it holds."""
    base = make_model(tmp_path / "base", torch_dtype="bfloat16")
    tensors = load_file(base / "model.safetensors")
    save_file({k: x.astype(ml_dtypes.bfloat16) for k, x in tensors.items()}, base / "model.safetensors")
    for steps in (0, 8):
        run, out = tmp_path / f"run{steps}", tmp_path / f"out{steps}"
        changes = {"data__eval": [SourceConfig(path=str(chats))], "evaluation__at_end": steps > 0}
        changes |= {"evaluation__num_questions": 2, "evaluation__max_new_tokens": 4}
        train(run_config(base, chats, run, training__max_steps=steps, lora=None, **LOW, **changes), one_device())
        export(run, out)
        before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
        assert before.keys() == after.keys()
        assert all(before[name].tobytes() == after[name].tobytes() for name in before) == (steps == 0)
    assert losses(run)[-1] < losses(run)[0]
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["tuned"]["loss"] < summary["base"]["loss"]
    opened = open_model(str(run), devices=one_device())
    table = flatten(opened.frozen)["embed_tokens", "weight"]
    assert np.array_equal(table, after["model.embed_tokens.weight"].astype(np.float32))
    assert len(opened.generator({}, opened.frozen, [[5, 6]], 3)) == 1


def test_under_lora_adapters_stay_float32(tiny, chats, tmp_path, capsys):
    run = tmp_path / "run"
    train(run_config(tiny, chats, run, data__added_tokens=["<|new|>"], **LOW), one_device())
    found = {
        (path[-1] if "lora" in path[-1] else "base", str(leaf.dtype)) for path, leaf in trained_leaves(run).items()
    }
    assert found == {("lora_a", "float32"), ("lora_b", "float32"), ("base", "bfloat16")}
    said = capsys.readouterr().err
    assert " bfloat16, " in said
    assert " float32)" in said
    assert "the files are float32; trained weights are rounded to bfloat16" in said
    assert "optimizer  adamw, moments bfloat16, updates rounded stochastically" in said
    assert losses(run)[-1] < losses(run)[0]
