"""Low-precision weights and moments on a mesh, and in whole runs."""

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
from test_moments import KEY, LOW, bits, relative

from sft_jax.assembly import open_model
from sft_jax.config import OptimizerConfig, SourceConfig
from sft_jax.models.quantized import embedding_lookup
from sft_jax.run.export import export
from sft_jax.run.train import train
from sft_jax.sharding import make_mesh, named_sharding
from sft_jax.training.moments import Factored, Rounded
from sft_jax.training.optimizer import labels_of, make_optimizer
from sft_jax.training.rounding import apply_updates
from sft_jax.training.state import abstract_state, make_state, state_shardings
from sft_jax.training.step import make_train_step
from sft_jax.training.weights import build
from sft_jax.tree import flatten
from sft_jax.typing import Batch

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
    jaxpr = step.trace(state, {}, batch_of(16)).jaxpr

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
