"""A killed and resumed run is bit for bit equal to an uninterrupted one."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import date
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from kit import CHATML, config_of, conversations, losses, make_model, one_device, trained_leaves, write_jsonl

from sft_jax import config_file as configs
from sft_jax.config import SourceConfig
from sft_jax.data.chat.encoder import prompt_ids
from sft_jax.errors import UserError
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.run.evaluate import evaluate
from sft_jax.run.train import train
from sft_jax.store.checkpoint import Checkpoints
from sft_jax.store.folder import RunDirectory
from sft_jax.training.state import TrainState


@pytest.mark.smoke
def test_a_finished_run_is_left_alone(tiny, chats, tmp_path):
    config = config_of(tiny, chats, tmp_path / "run", training__max_steps=4)
    train(config, one_device())
    before = losses(tmp_path / "run")
    assert train(config, one_device())["step"] == 4
    assert losses(tmp_path / "run") == before


def test_killed_while_the_first_checkpoint_was_written(tiny, chats, tmp_path):
    (tmp_path / "run" / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir(parents=True)
    config = config_of(tiny, chats, tmp_path / "run", training__max_steps=3, data__eval=[SourceConfig(path=str(chats))])
    assert train(config, one_device())["step"] == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]


def test_a_run_that_was_killed_before_its_first_checkpoint_says_so(tiny, chats, tmp_path, capsys):
    config = config_of(tiny, chats, tmp_path / "run", training__max_steps=1)
    train(config, one_device())
    assert "restart" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train(config, one_device())
    assert "restart  an earlier start saved no checkpoint here" in capsys.readouterr().err
    train(config, one_device())
    assert "restart" not in capsys.readouterr().err


def test_a_resumed_run_keeps_the_best_checkpoint(tmp_path):
    """The losses of earlier checkpoints are read from disk."""
    state = TrainState(jnp.zeros((), jnp.int32), {"a": jnp.ones(2)}, {"moment": jnp.ones(2)}, jnp.zeros((), bool))
    for measured in ({10: 1.0, 20: 0.5, 30: 0.9}, {40: 0.8, 50: 0.7}, {60: None}):
        checkpoints = Checkpoints(epath.Path(tmp_path / "checkpoints"), keep=1, keep_best=1)
        for step, loss in measured.items():
            checkpoints.save(step, state, data={}, run={}, eval_loss=loss)
        checkpoints.wait()
        assert checkpoints.steps() == [20, max(measured)]
        checkpoints.close()


def test_what_a_killed_run_had_to_remove_is_removed(tiny, chats, tmp_path):
    """Killed after the last checkpoint got its name, and while the oldest was being removed."""
    changes = {"data__eval": [SourceConfig(path=str(chats))], "training__save_every": 2, "training__eval_every": 2}
    config = config_of(tiny, chats, tmp_path / "run", training__max_steps=8, **changes, training__keep_best=1)
    train(config, one_device())
    folder = tmp_path / "run" / "checkpoints"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"6", "8"}
    for step in ("1", "3"):
        shutil.copytree(folder / "6", folder / step)
    for file in ("_CHECKPOINT_METADATA", "metrics/metrics", "params/_METADATA"):
        (folder / "1" / file).unlink()
    train(config, one_device())
    assert {path.name for path in folder.iterdir()} == names


def test_templates_use_the_date_of_the_first_day(tiny, chats, tmp_path, monkeypatch):
    """The template of Llama 3.2 prints the current date; a run that resumes on another day keeps the first date."""
    template = tmp_path / "dated.jinja"
    template.write_text("{{ '<s>system' + strftime_now('%d %b %Y') + '</s>' }}" + CHATML)
    changes = {"training__max_steps": 4, "training__save_every": 2, "data__chat_template": str(template)}
    config = config_of(tiny, chats, tmp_path / "run", **changes)

    def on(day):
        monkeypatch.setattr("sft_jax.run.resume.date", SimpleNamespace(today=lambda: date.fromisoformat(day)))
        train(config, one_device())
        return configs.load(tmp_path / "run" / "config.yaml").data.date

    assert on("2024-02-29") == "2024-02-29"
    whole = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert on("2024-03-01") == "2024-02-29"
    assert losses(tmp_path / "run") == whole

    dates = []

    def prepare(config, *_):
        dates.append(config.data.date)
        raise InterruptedError

    monkeypatch.setattr("sft_jax.run.evaluate.prepare", prepare)
    for day in (None, "2024-05-01"):
        with pytest.raises(InterruptedError):
            evaluate(dataclasses.replace(config, data=dataclasses.replace(config.data, date=day)), devices=one_device())
    assert dates == ["2024-02-29", "2024-05-01"]
    tokenizer, _ = load_tokenizer(tiny, str(template))
    prompt = tokenizer.decode(prompt_ids(tokenizer, conversations(1)[0]["messages"][:1], "2024-02-29"))
    assert "29 Feb 2024" in prompt


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDirectory("~/runs/x").local == tmp_path / "runs" / "x"
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    tokenizer, _ = load_tokenizer(make_model(tmp_path / "model"), "~/own.jinja")
    assert tokenizer.chat_template == "{{ messages }}"


def test_another_config_data_or_model_is_refused(tiny, tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", conversations(8))
    run = tmp_path / "run"
    train(config_of(tiny, data, run, training__max_steps=4), one_device())
    with pytest.raises(UserError, match=r"lora.alpha=8.0, but the config has 9.0"):
        train(config_of(tiny, data, run, training__max_steps=4, lora__alpha=9.0), one_device())
    with pytest.raises(UserError, match=r"max_steps=4, but the config has 5"):
        train(config_of(tiny, data, run, training__max_steps=5), one_device())
    write_jsonl(data, conversations(8, seed=1))
    with pytest.raises(UserError, match="training data has changed"):
        train(config_of(tiny, data, run, training__max_steps=4), one_device())
    write_jsonl(data, conversations(8))
    train(config_of(tiny, data, run, training__max_steps=4, training__log_every=2), one_device())


def test_not_finite_stops_with_rows_and_a_saved_state(tiny, chats, tmp_path):
    config = config_of(
        tiny,
        chats,
        tmp_path / "run",
        optimizer__learning_rate=1e30,
        optimizer__max_grad_norm=None,
        optimizer__schedule="constant",
    )
    with pytest.raises(UserError, match=r"step \d+: loss .*chats.jsonl row \d+.*saved as step \d+") as raised:
        train(config, one_device())
    step = int(str(raised.value).split(":")[0].removeprefix("step "))
    report = json.loads((tmp_path / "run" / "report" / f"not_finite_step_{step}.json").read_text())
    assert report["rows"]
    assert all("chats.jsonl row" in row for row in report["rows"])
    saved = trained_leaves(tmp_path / "run", step - 1)
    assert all(np.isfinite(leaf).all() for leaf in saved.values())
    assert losses(tmp_path / "run")[-1] is None  # written as null
    with pytest.raises(UserError, match=f"step {step}: "):  # resuming fails at the same step
        train(config, one_device())


def test_two_runs_do_not_share_a_directory(tiny, chats, tmp_path):
    """Neither while the other trains, nor while it starts; a process that was killed holds nothing."""
    config = config_of(tiny, chats, tmp_path / "run", training__max_steps=2)
    refused = []

    def callback(kind, step, metrics):
        if kind == "step" and step == 1:
            with pytest.raises(UserError) as error:
                train(config, one_device())
            refused.append(str(error.value))

    train(config, one_device(), callbacks=[callback])
    assert len(refused) == 1
    assert re.search(
        rf"/run is in use by process {os.getpid()} on .*, since 20\d\d-.*; wait for it or stop it", refused[0]
    )
    assert train(config, one_device())["step"] == 2

    code = (
        "import sys, time; from pathlib import Path; from sft_jax.files.lock import FolderLock; "
        "lock = FolderLock(Path(sys.argv[1])); print(lock.take(), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "None\n"
        folder = RunDirectory(str(tmp_path / "run"))
        with pytest.raises(UserError, match=f"in use by process {other.pid} on "):
            folder.check_free()
        with pytest.raises(UserError, match=f"in use by process {other.pid} on "):
            folder.create()
        other.kill()
    folder.check_free()
    folder.create()
    folder.release()
