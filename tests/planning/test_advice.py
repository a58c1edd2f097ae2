"""Advice and search of a plan, with a fake compiler."""

import dataclasses
from functools import partial

import jax
import pytest
from kit import run_config

from sft_jax.errors import UserError
from sft_jax.hf.config import read_architecture
from sft_jax.planning.advice import Outcome, advise
from sft_jax.planning.changes import as_text, changed
from sft_jax.planning.chips import CHIPS
from sft_jax.planning.search import Prediction, candidates, choose
from sft_jax.planning.step import Base, Compiled, abstract_step
from sft_jax.planning.topology import Topology, parse_topology


@pytest.fixture(scope="module")
def base(tiny):
    return Base(read_architecture(tiny), embeddings=False)


def config_of(tiny, **changes):
    return run_config(tiny, **{"training__batch_size": 8, "model__remat": "full", "data__max_length": 64} | changes)


def fake_compiler(limit, calls):
    """Memory in bytes by a fake formula: weights by dtype and quantization, activations by batch size and remat."""

    def compile_with(config, where):
        calls.append((config, str(where)))
        tensor = config.mesh.tensor
        shards = where.num_devices // tensor
        rows, left = divmod(config.training.batch_size // config.training.num_microbatches, shards)
        if left or not rows:
            raise UserError("training.batch_size: does not divide")
        weights = {None: 1600, "int8": 800, "nf4": 400}[config.model.quantization]
        if config.lora is None:
            weights = 3200 if config.model.param_dtype == "float32" else 1600
            weights += {"float32": 6400, "bfloat16": 3200, "factored": 1600}[config.optimizer.moments]
        resident = weights // (where.num_devices // config.mesh.data)
        peak = resident + rows * {"dots": 100, "attention": 50, "full": 20, "auto": 20}[config.model.remat]
        return Outcome(peak <= limit, peak, resident)

    return compile_with


def advice_for(tiny, limit, topology="v5e:4x4", **changes):
    changes = {"training__batch_size": 64, "model__remat": "dots"} | changes
    config = run_config(tiny, mesh__data=1, **changes)
    calls = []
    compile_with = fake_compiler(limit, calls)
    where = parse_topology(topology)
    found = compile_with(config, where)
    assert not found.fits
    return advise(config, where, 64, limit, found, compile_with), calls


@pytest.mark.parametrize(
    ("limit", "changes", "advised"),
    [
        (190, {}, "model.remat=full"),
        (150, {"model__remat": "auto"}, "training.num_microbatches=2"),
        (125, {"model__remat": "auto"}, "training.num_microbatches=4"),
        (125, {}, "model.remat=full training.num_microbatches=4"),
        (75, {}, "model.remat=full training.num_microbatches=4 model.quantization=int8"),
        (50, {}, "model.remat=full training.num_microbatches=4 model.quantization=nf4"),
        (90, {}, "model.remat=full training.num_microbatches=2 model.quantization=int8"),
    ],
)
def test_advice_is_the_first_that_fits(tiny, limit, changes, advised):
    advice, calls = advice_for(tiny, limit, **changes)
    assert advice.outcome.fits
    assert advice.outcome.peak_bytes <= limit
    assert sorted(as_text(advice.changes).split()) == sorted(advised.split()), advice.tried
    assert len(calls) == len(advice.tried) + 1
    assert str(advice.topology) == "v5e:4x4"
    assert all(fits == (outcome.peak_bytes <= limit) for _, _, outcome in advice.tried for fits in [outcome.fits])


def test_advice_for_full_fine_tuning(tiny):
    advice, _ = advice_for(tiny, 450, lora=None)
    assert "model.param_dtype=bfloat16" in as_text(advice.changes)
    assert "optimizer.moments" in as_text(advice.changes)


def test_advice_adds_chips_last(tiny):
    advice, calls = advice_for(tiny, 33, model__quantization="nf4")
    assert str(advice.topology) == "v5e:4x8"
    assert advice.outcome.fits
    assert [where for _, where in calls][-1] == "v5e:4x8"


def test_advice_may_be_none(tiny):
    advice, _ = advice_for(tiny, 1)
    assert advice.changes is None
    assert not advice.outcome.fits
    assert advice.tried


def test_changes_are_checked(tiny):
    config = run_config(tiny)
    assert changed(config, {"model.remat": "full", "mesh.tensor": 2}).mesh.tensor == 2
    assert changed(config, {}) == config
    with pytest.raises(UserError, match="num_microbatches"):
        changed(config, {"training.num_microbatches": 3})


def test_search_takes_the_fastest_that_fits(tiny, base):
    """Ranks by formula, skips candidates that need more memory than a failed one, returns the fastest that fits."""
    config = config_of(tiny, training__batch_size=12)
    build_step = partial(abstract_step, base=base, devices=jax.devices())
    ranked = candidates(config, lambda c: build_step(c), 8, CHIPS["v5e"], 0.5, 64)
    speeds = [one.tokens_per_second for one in ranked]
    assert speeds == sorted(speeds, reverse=True)
    assert {one.step.mesh.shape["tensor"] for one in ranked} == {1, 2, 4}  # four heads
    assert all(one.step.config.training.batch_size in (12, 16) for one in ranked)
    compiled = []

    def compile_with(candidate):
        compiled.append(candidate)
        fits = candidate.remat == "full"
        return Compiled(candidate.remat, 1, fits, 1, 1, 1, 0, 0, 0.0, 0.0, None, None)

    choices = choose(ranked, 2**40, compile_with, lambda candidate, _: Prediction(candidate.expected, None))
    assert choices[0].predicted is not None
    assert choices[0].candidate.remat == "full"
    fastest = max(one.tokens_per_second for one in compiled if one.remat == "full")
    assert choices[0].tokens_per_second == fastest
    assert len(compiled) == len(choices) <= 12


def test_search_ranks_by_the_cycles_of_the_compiler(tiny, base):
    """The compiler turns the order of the formula round; the network bounds where it takes longer than the cycles."""
    build_step = partial(abstract_step, base=base, devices=jax.devices())
    ranked = candidates(config_of(tiny), lambda c: build_step(c), 8, CHIPS["v5e"], 0.5, 64)
    assert ranked[0].expected.seconds < 1e-3
    times = iter((4.0, 3.0, 1.0, 2.0))

    def compile_with(candidate):
        return Compiled(candidate.remat, 1, True, 1, 1, 1, 0, 0, 0.0, 0.0, None, None)

    def predict(candidate, _):
        compiled_seconds = next(times)
        network = dataclasses.replace(candidate.expected, network_seconds=2.5)
        return Prediction(network if compiled_seconds == 1.0 else candidate.expected, compiled_seconds)

    choices = choose(ranked, 2**40, compile_with, predict)
    assert [one.candidate for one in choices] == [ranked[at] for at in (3, 2, 1, 0)]
    assert [one.predicted.seconds for one in choices] == [2.0, 2.5, 3.0, 4.0]
    assert [one.predicted.bound for one in choices] == ["cycles", "network", "cycles", "cycles"]
    assert choices[0].tokens_per_second == 8 * 64 / 2.0
    assert {one.predicted.ranked_by for one in choices} == {"cycles"}


def test_a_prediction_without_cycles_is_the_roofline(tiny, base):
    build_step = partial(abstract_step, base=base, devices=jax.devices())
    (best, *_) = candidates(config_of(tiny), lambda c: build_step(c), 8, CHIPS["v5e"], 0.5, 64)
    prediction = Prediction(best.expected, None)
    assert (prediction.seconds, prediction.bound) == (best.expected.seconds, best.expected.bound)
    assert prediction.ranked_by == "roofline"


def test_topologies_are_compared_by_value():
    assert Topology(CHIPS["v5e"], (4, 4)) == parse_topology("v5e:16")
