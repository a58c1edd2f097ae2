"""``--step best|last|N``, early stopping, and runs that begin with the weights of another."""

import json
import re

import numpy as np
import pytest
from kit import config_of, one_device, trained_leaves, write_jsonl

from sft_jax.config import SourceConfig
from sft_jax.errors import Stopped, UserError
from sft_jax.run.train import train
from sft_jax.store.metrics import read_metrics
from sft_jax.store.opened import open_run
from sft_jax.store.steps import choose_step

LOSSES = [{"step": 10, "eval_loss": 0.5}, {"step": 20, "eval_loss": 0.4}, {"step": 30, "eval_loss": 0.6}]


@pytest.mark.parametrize(
    ("step", "steps", "chosen", "said"),
    [
        (None, [10, 30], 30, ""),
        ("last", [10, 30], 30, ""),
        (10, [10, 30], 10, ""),
        ("best", [10, 30], 10, "step 20 had 0.4000 and was not saved"),
        ("best", [10, 20, 30], 20, "run: the best checkpoint is step 20, held-out loss 0.4000\n"),
    ],
)
def test_a_checkpoint_is_chosen(step, steps, chosen, said, capsys):
    assert choose_step("run", step, steps, [{"step": 5, "loss": 1.0}, *LOSSES]) == chosen
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("step", "metrics", "words"),
    [
        (20, LOSSES, "run: has no checkpoint of step 20; there are 10, 30"),
        ("best", [{"step": 10, "loss": 1.0}], "run: no checkpoint has a held-out loss"),
        ("bset", LOSSES, "'bset' is neither a step nor best or last"),
    ],
)
def test_what_cannot_be_chosen(step, metrics, words):
    with pytest.raises(UserError, match=re.escape(words)):
        choose_step("run", step, [10, 30], metrics)


def config(tiny, chats, run, **changes):
    """A run whose held-out loss rises: it learns the training rows, with a high rate."""
    return config_of(tiny, chats, run, data__eval=[SourceConfig(path=str(chats.parent / "held_out.jsonl"))], **changes)


@pytest.fixture(scope="module")
def held_out(chats):
    """Questions of the training rows with other answers."""
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    for row in rows:
        row["messages"][-1]["content"] = "seven seas and " + row["messages"][0]["content"]
    return write_jsonl(chats.parent / "held_out.jsonl", rows[:8])


EVERY = {"training__eval_every": 2, "training__save_every": 2, "training__max_steps": 60}
STOPPING = EVERY | {"training__keep_best": 1, "training__early_stopping": 3, "optimizer__learning_rate": 5e-3}


def test_early_stopping(tiny, chats, held_out, tmp_path, capsys):
    """Three evaluations after the best, also if the run is resumed in between, and then there is nothing to do."""
    whole = config(tiny, chats, tmp_path / "whole", **STOPPING)
    train(whole, one_device())
    said = capsys.readouterr().err
    rows = [row for row in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "eval_loss" in row]
    losses = {row["step"]: row["eval_loss"] for row in rows}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 6 < 60
    assert f"step {best + 6}/60  stops early: the held-out loss has not fallen below {losses[best]:.4f}" in said
    assert f"--step best, or sft-jax export {tmp_path / 'whole'} OUT --step best" in said
    steps = {int(path.name) for path in (tmp_path / "whole" / "checkpoints").iterdir()}
    assert {best, best + 6} <= steps

    parts = config(tiny, chats, tmp_path / "parts", **STOPPING)
    at = best + 4

    def stop(kind, step, metrics):
        return "stop" if (kind, step) == ("step", at) else None

    with pytest.raises(Stopped):
        train(parts, one_device(), callbacks=[stop])
    train(parts, one_device())
    again = [row for row in read_metrics(tmp_path / "parts" / "metrics.jsonl") if "eval_loss" in row]
    assert {row["step"]: row["eval_loss"] for row in again} == losses
    capsys.readouterr()
    assert train(parts, one_device())["step"] == best + 6
    assert f"done  {best + 6} steps of 60, stopped early" in capsys.readouterr().err
    assert open_run(tmp_path / "whole", "best").step == best


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_goes_on_from_another(kind, tiny, chats, tmp_path, capsys):
    """With the optimizer state and a constant rate, two runs are one run twice as long, apart from the data's order."""
    shape = {"optimizer__schedule": "constant", "optimizer__warmup_ratio": 0.0, "data__shuffle": False}
    shape |= {"data__packing": False, "training__save_every": 2, "training__batch_size": 40}  # all rows in each step
    shape |= {"lora__dropout": 0.0} if kind == "lora" else {"lora": None}  # its masks depend on the step
    train(config_of(tiny, chats, tmp_path / "whole", **shape, training__max_steps=4), one_device())
    train(config_of(tiny, chats, tmp_path / "first", **shape, training__max_steps=2), one_device())
    goes_on = {"training__continue_from": str(tmp_path / "first"), "training__max_steps": 2}
    exact = config_of(tiny, chats, tmp_path / "exact", **shape, **goes_on, training__continue_optimizer=True)
    capsys.readouterr()
    train(exact, one_device())
    said = capsys.readouterr().err
    assert f"continued  from {tmp_path / 'first'} at step 2 and its optimizer state, a new schedule" in said
    train(config_of(tiny, chats, tmp_path / "fresh", **shape, **goes_on), one_device())
    whole, exact_, fresh = (
        trained_leaves(tmp_path / name, step) for name, step in (("whole", 4), ("exact", 2), ("fresh", 2))
    )
    for path, leaf in whole.items():
        np.testing.assert_array_equal(leaf, exact_[path], err_msg=str(path))
    assert any(not np.array_equal(leaf, fresh[path]) for path, leaf in whole.items())
    train(exact, one_device())  # a resume does not begin with the other run again
    assert "resume  at step 2 of 2" in capsys.readouterr().err


def test_a_run_cannot_go_on_from_everything(tiny, chats, tmp_path):
    train(config_of(tiny, chats, tmp_path / "first", training__max_steps=1), one_device())
    first = str(tmp_path / "first")
    for changes, words in (
        ({"training__continue_from": f"{first}@7"}, "has no checkpoint of step 7; there are 1"),
        ({"training__continue_from": str(tmp_path / "none")}, "training.continue_from: .*none: not a run directory"),
        ({"training__continue_from": first, "lora__rank": 2}, "training.continue_from: .* has the shape"),
        ({"training__continue_from": first, "lora__init_from": "a"}, "leave one of the two out"),
    ):
        with pytest.raises(UserError, match=words):
            train(config_of(tiny, chats, tmp_path / "next", **changes, training__max_steps=1), one_device())
    assert not (tmp_path / "next" / "checkpoints").exists()
    with pytest.raises(UserError, match=r"there is no run to take it from; set training\.continue_from"):
        config_of(tiny, chats, tmp_path / "next", training__continue_optimizer=True)
    with pytest.raises(UserError, match=r"keep_best=1"):
        config_of(tiny, chats, tmp_path / "next", training__early_stopping=2)
