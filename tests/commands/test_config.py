"""Configs are read and checked, and errors name the key and the problem."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kit import ROOT
from omegaconf import OmegaConf

from sft_jax import config_file as config
from sft_jax.cli import main
from sft_jax.config import Config, EvaluationConfig
from sft_jax.errors import UserError

pytestmark = pytest.mark.smoke

SMALLEST = "model: {path: some/model}\ndata: {train: [{path: a.jsonl}]}\ntraining: {output_dir: runs/a}\n"


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(SMALLEST)
    return path


def test_defaults_and_overrides(smallest):
    loaded = config.load(smallest, ["optimizer.learning_rate=2e-5", "data.train.0.weight=2", "lora.rank=8"])
    assert loaded.optimizer.learning_rate == 2e-5
    assert loaded.data.train[0].weight == 2.0
    assert loaded.lora is not None
    assert loaded.lora.rank == 8
    assert loaded.model.dtype == "bfloat16"
    assert config.load(smallest, ["lora=null"]).lora is None


def test_saved_config_reads_back_equal(smallest, tmp_path):
    loaded = config.load(smallest, ["lora.target_modules=[q_proj, v_proj]"])
    config.save(loaded, tmp_path / "resolved.yaml")
    assert config.load(tmp_path / "resolved.yaml") == loaded


@pytest.mark.parametrize(
    "text", ["what ${HOME} means", r"\${x}", r"a\\${b", "12e4567", "007", "yes", "~", "1:30", r"\d", ""]
)
def test_any_text_is_saved_as_it_is(smallest, tmp_path, text):
    loaded = config.load(smallest)
    model = dataclasses.replace(loaded.model, revision=text)
    given = dataclasses.replace(loaded, model=model, evaluation=EvaluationConfig(samples=[text]))
    config.save(given, tmp_path / "resolved.yaml")
    assert config.load(tmp_path / "resolved.yaml") == given


def test_overrides_may_follow_options(smallest, capsys):
    assert main(["plan", str(smallest), "lora.rank=8", "--topology", "v5e:4x4", "lora.rnk=3"]) == 2
    assert "lora.rnk" in capsys.readouterr().err
    for more in ("--bogus", "--bogus=3", "word"):
        with pytest.raises(SystemExit):
            main(["plan", str(smallest), "--topology", "v5e:4x4", more])
        assert f"unrecognized arguments: {more}" in capsys.readouterr().err


def test_checks_across_keys(smallest):
    keys = ["data.eval=[{path: x.jsonl}]", "training.keep_best=1", "training.eval_every=100"]
    assert config.load(smallest, [*keys, "training.save_every=200", "data.date=2024-02-29"]).data.date == "2024-02-29"
    with pytest.raises(UserError, match="save_every 250 is not a multiple of eval_every 100"):
        config.load(smallest, [*keys, "training.save_every=250"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.rnk=3", "unknown key 'lora.rnk'; did you mean 'rank'"),
        ("nonsense=1", "unknown key 'nonsense'; known keys: model, lora"),
        ("data.train=[{path: x, formt: y}]", "did you mean 'format'"),
        ("data.added_tokens=[[1]]", r"data\.added_tokens\.0: \[1\] is not a string"),
        (
            "data.train=[{path: x, columns: {question: [1]}}]",
            r"data\.train\.0\.columns\.question: \[1\] is not a string",
        ),
        ("data.train=[{path: x, ignore_columns: [{a: 1}]}]", r"data\.train\.0\.ignore_columns\.0: \{'a': 1\} is not"),
        ("lora.rank=abc", "lora.rank: .*'abc'"),
        ("lora.rank=0", "lora.rank: 0 is not"),
        ("training.max_steps=3.5", "training.max_steps"),
        ("training.batch_size=null", "training.batch_size"),
        ("model.dtype=fp8", "model.dtype: 'fp8' is not one of bfloat16, float32"),
        ("model.param_dtype=float16", "model.param_dtype: 'float16' is not one of float32, bfloat16"),
        ("optimizer.moments=int8", "optimizer.moments: 'int8' is not one of float32, bfloat16, factored"),
        ("model.attention=flash", "model.attention: 'flash' is not one of"),
        ("training.num_microbatches=3", "3 does not divide batch_size 16"),
        ("data.train=[]", "data.train: names no source"),
        ("data.date=2023-02-29", "data.date: '2023-02-29' is not a date as YYYY-MM-DD"),
        ("mesh.data=-1", "mesh: only one axis may be -1"),
        ("model.init=random", "set lora: null"),
        ("data.eval.0.path=x", r"no such list entry; set the whole list, such as 'data\.eval=\["),
        ("data.train.1.path=x", r"data\.train\[1\]: no such list entry"),
        ("optimizer", "key=value"),
        ("lora=[", "not valid YAML"),
    ],
)
def test_bad_values_are_named(smallest, override, words):
    with pytest.raises(UserError, match=words) as raised:
        config.load(smallest, [override])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {path: x", "not valid YAML"),
        ("- a list", "a config is a mapping"),
        ("model: {path: x}\ndata: {train: [{path: a}]}", "training.output_dir is required"),
    ],
)
def test_bad_files_are_named(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as raised:
        config.load(path)
    assert str(path) in str(raised.value)
    with pytest.raises(UserError, match="no such config file"):
        config.load(tmp_path / "absent.yaml")


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom sft_jax.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "train" in done.stdout
    assert not re.search(r"\b(jax|flax|transformers|datasets|omegaconf|numpy)\b(?!\.)", done.stdout.split("\n")[-2])


def test_example_config_has_every_key_at_its_default():
    path = ROOT / "configs" / "example.yaml"
    loaded = config.load(path)
    written = OmegaConf.load(path)
    assert not OmegaConf.missing_keys(written)

    def same_keys(section, instance):
        assert set(section) == {f.name for f in dataclasses.fields(instance)}
        for name, part in section.items():
            if dataclasses.is_dataclass(getattr(instance, name)):
                same_keys(part, getattr(instance, name))

    same_keys(written, loaded)
    defaults = Config(data=loaded.data)
    for name in ("lora", "optimizer", "mesh"):
        assert getattr(loaded, name) == getattr(defaults, name)


def test_a_command_leaves_torch_out_where_it_is_installed(tiny, chats, smallest, tmp_path):
    fake = tmp_path / "packages" / "torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise AssertionError('torch was imported')\n")
    program = "import sys; from sft_jax.__main__ import run; print(run(), sys.modules['torch'])"
    given = ["-c", program, "inspect", str(smallest), f"model.path={tiny}", f"data.train.0.path={chats}"]
    environment = os.environ | {"PYTHONPATH": str(fake.parent)}
    done = subprocess.run([sys.executable, *given], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.endswith("0 None\n"), done.stdout + done.stderr
