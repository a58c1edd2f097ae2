"""``num_microbatches: auto``: what is tried in which order, what is taken, and a step that ran out of memory."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from kit import losses, one_device, run_config

from sft_jax.errors import UserError
from sft_jax.run.train import train
from sft_jax.training.compilation import MIN_TOKENS, Steps, fit_candidates
from sft_jax.typing import Batch

OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")


def batch_of(sequences, length):
    ids = jnp.zeros((sequences, length), jnp.int32)
    return Batch(ids, ids, jnp.ones((sequences, length)), ids + 1, ids)


def card(memory):
    stats = {"bytes_limit": memory, "bytes_in_use": 0}
    return SimpleNamespace(device_kind="card", platform="gpu", memory_stats=lambda: stats)


def program(needed, log, fails=()):
    """Stands in for a jitted step: it needs so many bytes, and running it fails for some ways."""

    def make(remat, parts):
        def run(state, frozen, batch):
            log.append((remat, parts))
            if (remat, parts) in fails:
                raise OUT_OF_MEMORY
            return (remat, parts), {}

        memory = SimpleNamespace(
            temp_size_in_bytes=needed[remat] // parts, peak_memory_in_bytes=0, argument_size_in_bytes=0
        )
        run.memory_analysis = lambda: memory
        compiled = SimpleNamespace(compile=lambda: run)
        return SimpleNamespace(lower=lambda *_: compiled)

    return make


def test_order_of_ways():
    """No policy that computes more before fewer tokens a device than products need."""
    ways = fit_candidates("auto", "auto", sequences=8, length=MIN_TOKENS // 2)
    assert ways[:3] == [("dots", 1), ("dots", 2), ("dots", 4)]
    assert ways[3:6] == [("attention", 1), ("attention", 2), ("attention", 4)]
    assert ways[6:] == [("full", 1), ("full", 2), ("full", 4), ("full", 8)]
    assert fit_candidates("none", "auto", 4, 16) == [("none", 1), ("none", 2), ("none", 4)]
    assert fit_candidates("auto", 2, 4, 16) == [("dots", 2), ("attention", 2), ("full", 2)]


@pytest.mark.parametrize(
    ("memory", "expected"), [(900, ("dots", 1)), (500, ("dots", 2)), (120, ("full", 4)), (60, ("full", 8))]
)
def test_the_first_that_fits_is_taken(memory, expected):
    told = []
    needed = {"dots": 800, "attention": 790, "full": 400}
    ways = fit_candidates("auto", "auto", 8, MIN_TOKENS // 2)
    steps = Steps(program(needed, []), ways, card(memory), told.append)
    steps.prepare({}, {}, batch_of(8, 4), 4)
    assert (told[0].remat, told[0].num_microbatches) == expected


def test_what_cannot_fit_names_the_way_out():
    ways = fit_candidates("auto", "auto", 8, 16)
    with pytest.raises(UserError, match="does not fit on card with dots or attention or full"):
        Steps(program(dict.fromkeys(("dots", "attention", "full"), 8000), []), ways, card(100)).prepare(
            {}, {}, batch_of(8, 4), 4
        )
    several = Steps(program(dict.fromkeys(("dots", "full"), 8000), []), [("dots", 1), ("full", 1)], card(100))
    with pytest.raises(UserError, match=r"use training\.num_microbatches=auto, a smaller training\.batch_size"):
        several.prepare({}, {}, batch_of(8, 4), 4)


def test_a_step_that_runs_out_of_memory_is_repeated_in_smaller_parts(capsys):
    log, told = [], []
    make = program({"full": 10}, log, fails=[("full", 1), ("full", 2)])
    steps = Steps(make, fit_candidates("full", "auto", 4, 16), card(10**6), told.append)
    assert steps({"x": jnp.zeros(2)}, {}, batch_of(4, 4))[0] == ("full", 4)
    assert log == [("full", 1), ("full", 2), ("full", 4)]
    assert [one.num_microbatches for one in told] == [1, 2, 4]
    assert capsys.readouterr().err.count("ran out of memory") == 2
    steps({"x": jnp.zeros(2)}, {}, batch_of(4, 4))
    assert log[3:] == [("full", 4)]  # and stays with what works


def test_fixed_microbatches_are_not_changed():
    make = program({"full": 10}, [], fails=[("full", 2)])
    with pytest.raises(jax.errors.JaxRuntimeError):
        Steps(make, fit_candidates("full", 2, 4, 16), card(10**6))({"x": jnp.zeros(2)}, {}, batch_of(4, 4))


def test_a_run_in_parts_that_were_chosen(tiny, chats, tmp_path, monkeypatch):
    """A run that splits after running out of memory has the losses of one that was split from the start."""
    settings = {"training__max_steps": 3, "training__batch_size": 4, "model__remat": "full"}
    train(run_config(tiny, chats, tmp_path / "fixed", training__num_microbatches=2, **settings), one_device())
    from sft_jax.run import start

    original, made = start.step_of, []

    def step_of(*given):
        step, parts = original(*given), given[-1]
        made.append(parts)
        if parts > 1:
            return step

        def fails(*_):
            raise OUT_OF_MEMORY

        return SimpleNamespace(
            lower=lambda *given: SimpleNamespace(compile=lambda: _Failing(step.lower(*given).compile(), fails))
        )

    class _Failing:
        def __init__(self, compiled, fails):
            self.memory_analysis, self._fails = compiled.memory_analysis, fails

        def __call__(self, *given):
            self._fails()

    monkeypatch.setattr(start, "step_of", step_of)
    train(run_config(tiny, chats, tmp_path / "auto", training__num_microbatches="auto", **settings), one_device())
    assert made == [1, 2]
    assert losses(tmp_path / "auto") == losses(tmp_path / "fixed")
    rows = [json.loads(line) for line in (tmp_path / "auto" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
