"""What users met and stumbled over: one line that helps, at the right moment."""

import importlib.util
import os
import re

import jax
import pytest
from kit import run_config, sft_jax, write_jsonl

from sft_jax import config_file, version, without_tpus
from sft_jax.errors import UserError
from sft_jax.evaluation.score import _candidates
from sft_jax.training.compilation import _free_in_container

pytestmark = pytest.mark.smoke


@pytest.fixture
def config(tiny, chats, tmp_path):
    config_file.save(run_config(tiny, chats, tmp_path / "run"), tmp_path / "config.yaml")
    return tmp_path / "config.yaml"


def test_a_part_of_an_epoch_is_said(config):
    done = sft_jax("train", config, "training.max_steps=1", "training.batch_size=2")
    assert done.returncode == 0, done.stderr
    (line,) = [one for one in done.stderr.splitlines() if "steps of" in one]
    share = float(line.partition(" epoch(s)")[0].rpartition(" ")[2])
    assert 0 < share < 0.5


def test_an_unknown_adapter_is_refused_before_the_data_are_read(config):
    done = sft_jax("train", config, "lora.method=loha")
    assert done.returncode == 2
    assert "lora.method: 'loha' is not supported" in done.stderr
    assert "rows" not in done.stderr


def test_score_suggests_a_key():
    with pytest.raises(UserError, match=r"row 0: has neither .*; did you mean 'responses'\?"):
        _candidates({"prompt": "a", "response": ["b"]}, None, False, "row 0")


def test_examples_without_targets_once_cut(config, tmp_path):
    row = {"messages": [{"role": "user", "content": "river " * 200}, {"role": "assistant", "content": "bread"}]}
    data = write_jsonl(tmp_path / "long.jsonl", [row])
    for overlong, words in (("drop", "longer than"), ("truncate", "without a supervised token once they are cut to")):
        done = sft_jax("inspect", config, f"data.train={data}", f"data.overlong={overlong}", "data.max_length=64")
        assert f"are {words} data.max_length 64" in done.stderr


def test_the_memory_of_a_container(tmp_path):
    assert _free_in_container(tmp_path) is None
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert _free_in_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert _free_in_container(tmp_path) == 700


@pytest.mark.parametrize(
    ("installed", "has_tpu", "platforms"),
    [
        ({"libtpu"}, False, "cpu"),
        ({"libtpu"}, True, None),
        (set(), False, None),
        ({"libtpu", "jax_cuda13_plugin"}, False, None),
    ],
)
def test_no_tpu_is_looked_for_where_there_is_none(monkeypatch, installed, has_tpu, platforms):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr(without_tpus, "has_tpu", lambda: has_tpu)
    without_tpus.leave_out_tpus()
    assert os.environ.get("JAX_PLATFORMS") == platforms


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (
            "model=Qwen/Qwen3-0.6B",
            "override 'model=Qwen/Qwen3-0.6B': model is a section; use model.path=Qwen/Qwen3-0.6B",
        ),
        ("--model=Qwen/Qwen3-0.6B", "config keys are written key=value: use model.path="),
        ("--learning-rate=1e-4", "config keys are written key=value: use optimizer.learning_rate"),
    ],
)
def test_familiar_ways_are_answered(config, argument, words):
    done = sft_jax("inspect", config, argument)
    assert done.returncode == 2
    assert words in done.stderr


def test_version_says_what_runs_where():
    done = sft_jax("--version")
    assert done.returncode == 0
    ours, packages, devices = done.stdout.splitlines()
    assert re.fullmatch(rf"sft-jax {version.__version__}(, commit [0-9a-f]{{7,}})?", ours)
    assert f"jax {jax.__version__}" in packages
    assert devices.startswith("devices: 1 × cpu")
