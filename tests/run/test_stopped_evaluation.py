"""A run that is asked to stop during an evaluation stops at once, and repeats it when it resumes."""

import os
import signal

import numpy as np
import pytest
from kit import config_of, conversations, one_device, trained_leaves, write_jsonl

from sft_jax.config import SourceConfig
from sft_jax.errors import Preempted
from sft_jax.run import due
from sft_jax.run.train import train
from sft_jax.store.metrics import held_out_losses, read_metrics
from sft_jax.training.step import make_eval_step

EVERY, STEPS = 2, 4


def config_for(tiny, chats, tmp_path, name):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", conversations(60, seed=5))
    return config_of(
        tiny, chats, tmp_path / name,
        data__eval=[SourceConfig(path=str(held_out))],
        training__eval_every=EVERY, training__save_every=STEPS, training__max_steps=STEPS,
    )  # fmt: skip


def held_out(run):
    return held_out_losses(read_metrics(run / "metrics.jsonl"))


@pytest.mark.parametrize("step", [0, EVERY])
def test_a_stop_during_an_evaluation(tiny, chats, tmp_path, monkeypatch, step):
    calls = []

    def counted(*args):
        inner = make_eval_step(*args)

        def run(*inputs):
            calls.append(len(calls))
            if len(calls) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(*inputs)

        return run

    monkeypatch.setattr(due, "make_eval_step", counted)
    stop_at = -1
    train(config_for(tiny, chats, tmp_path, "whole"), one_device())
    a_round = len(calls) // (1 + STEPS // EVERY)
    assert a_round > 2
    calls.clear()
    stop_at = a_round * (step // EVERY) + 2
    stopped = config_for(tiny, chats, tmp_path, "stopped")
    with pytest.raises(Preempted, match="asked to stop; " + ("the same command starts" if step == 0 else "step 2 is")):
        train(stopped, one_device())
    assert len(calls) == stop_at
    assert sorted(held_out(tmp_path / "stopped")) == [*range(0, step, EVERY)]
    train(stopped, one_device())
    assert held_out(tmp_path / "stopped") == held_out(tmp_path / "whole")
    weights = trained_leaves(tmp_path / "whole")
    for name, value in trained_leaves(tmp_path / "stopped").items():
        np.testing.assert_array_equal(value, weights[name])
