"""Which rematerialisation is chosen, and that it changes memory and nothing else."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kit import losses, one_device, run_config

from sft_jax.config import LoraConfig
from sft_jax.errors import UserError
from sft_jax.hf.config import read_architecture
from sft_jax.hf.reader import TensorReader
from sft_jax.models.remat import POLICIES
from sft_jax.run.train import train
from sft_jax.sharding import make_mesh
from sft_jax.training.compilation import CANDIDATES, Steps, fit_candidates, free_bytes
from sft_jax.training.losses import batch_loss
from sft_jax.training.weights import build, load_weights
from sft_jax.typing import Batch


def batch_of(rows, length):
    ids = jnp.asarray(np.random.default_rng(0).integers(4, 300, (rows, length)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)
    return Batch(ids, jnp.roll(ids, -1, 1), jnp.ones(ids.shape), jnp.ones_like(ids), positions)


@pytest.fixture(scope="module")
def gradient_with(tiny):
    """The gradient of a batch, as a jitted function, with a policy; and what it is to be called with."""
    arch = read_architecture(tiny)
    mesh = make_mesh(devices=one_device())

    def make(policy):
        split = build(arch, mesh, LoraConfig(rank=4), "float32", policy)
        return split, jax.jit(
            jax.grad(lambda params, frozen, batch: batch_loss(split.merge(params, frozen), batch)["loss"])
        )

    split, _ = make("full")
    params, frozen = load_weights(split, TensorReader(tiny), LoraConfig(rank=4))
    params = jax.tree.map(lambda x: x + 0.01, params)
    return lambda policy: make(policy)[1], params, frozen


def test_policies_give_the_same_gradients_and_ever_less_memory(gradient_with):
    make, params, frozen = gradient_with
    batch = batch_of(4, 256)
    programs = {policy: make(policy).lower(params, frozen, batch).compile() for policy in POLICIES}
    sizes = [program.memory_analysis().temp_size_in_bytes for program in programs.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 2 * sizes[-1]
    results = [program(params, frozen, batch) for program in programs.values()]
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), results[0], other)


@pytest.mark.smoke
def test_no_matrix_product_is_computed_twice_with_dots(gradient_with):
    """Products with weights in the program: forward and to the input, and once more where they are made again."""
    make, params, frozen = gradient_with
    batch = batch_of(2, 64)

    def products(policy):
        text = make(policy).lower(params, frozen, batch).as_text()
        return sum("dot_general" in line and "48x112xf32" in line for line in text.splitlines())

    assert products("none") == products("dots") < products("attention") == products("full")


def device(free):
    return SimpleNamespace(
        platform="gpu", device_kind="card", memory_stats=lambda: {"bytes_limit": free + 1000, "bytes_in_use": 1000}
    )


def test_auto_takes_the_first_that_fits(gradient_with):
    make, params, frozen = gradient_with
    batch = batch_of(4, 256)
    sizes = {
        policy: make(policy).lower(params, frozen, batch).compile().memory_analysis().temp_size_in_bytes
        for policy in CANDIDATES
    }
    ways = fit_candidates("auto", 1, 4, 256)

    def with_policy(policy, num_microbatches):
        assert num_microbatches == 1
        return make(policy)

    for policy in CANDIDATES:
        told = []
        steps = Steps(with_policy, ways, device(int(sizes[policy] / 0.92) + 4096), told.append)
        steps.prepare(params, frozen, batch_of(4, 64), 256)
        assert [(one.remat, one.length) for one in told] == [(policy, 256)]
        steps(params, frozen, batch_of(4, 64))  # shorter rows: another program, the same policy
        steps(params, frozen, batch)
        steps(params, frozen, batch_of(4, 64))
        assert [(one.remat, one.length) for one in told] == [(policy, 256), (policy, 64)]
    nothing = Steps(with_policy, ways, device(1000))
    said = (
        r"does not fit on card with dots or attention or full: it needs 0\.0\d GiB, more than 92% of the 0\.00 GiB free"
    )
    with pytest.raises(UserError, match=said):
        nothing.prepare(params, frozen, batch, 256)
    told = []
    Steps(with_policy, [("none", 1)], device(1000), told.append).prepare(
        params, frozen, batch, 256
    )  # what is asked for is done
    assert told[0].remat == "none"


@pytest.mark.smoke
def test_free_memory_is_told_on_this_machine():
    free = free_bytes(jax.devices()[0])
    assert free is None or 2**20 < free < 2**50


@pytest.mark.smoke
def test_an_unpacked_run_compiles_for_few_row_lengths(tiny, chats, tmp_path, capsys):
    changes = {"data__packing": False, "data__max_length": 120, "training__max_steps": 8, "training__batch_size": 2}
    train(run_config(tiny, chats, tmp_path / "run", **changes), one_device())
    said = capsys.readouterr().err
    compiled = [line for line in said.splitlines() if line.strip().startswith("compiled")]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    num_tokens = {row["slot_tokens"] for row in rows if "loss" in row}
    assert 1 < len(num_tokens) <= len(compiled) <= 5
    assert all(row["real_tokens"] <= row["slot_tokens"] for row in rows if "loss" in row)
    assert np.isfinite(losses(tmp_path / "run")).all()
