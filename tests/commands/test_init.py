"""``sft-jax init`` writes a config that trains, and says why; ``builtin:`` names and run directories are configs."""

import csv
import json
import math

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kit import make_model, process, write_jsonl

from sft_jax.cli import main
from sft_jax.config_file import load
from sft_jax.planning.proposal import METHODS, Facts, propose


@pytest.mark.smoke
def test_a_written_config_trains(tiny, chats, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--model", str(tiny), "--data", str(chats), "--eval", str(chats), "--out", "own.yaml"]) == 0
    said = capsys.readouterr().err
    assert "next  sft-jax inspect own.yaml, then sft-jax train own.yaml" in said
    config = load("own.yaml", ["training.max_steps=2", "model.dtype=float32"])
    assert config.data.eval[0].path == str(chats)
    assert config.training.output_dir == "runs/own"
    assert main(["train", "own.yaml", "training.max_steps=2"]) == 0
    assert "at most" not in capsys.readouterr().err
    assert main(["init", "--model", str(tiny), "--data", str(chats), "--out", "own.yaml"]) == 2
    assert "own.yaml exists; name another file" in capsys.readouterr().err


def test_columns_and_a_template_are_proposed(tmp_path, monkeypatch, capsys):
    """Columns in capitals, a CSV with semicolons, and a base model without a chat template."""
    monkeypatch.chdir(tmp_path)
    model = make_model(tmp_path / "model")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with open("faq.csv", "w", newline="") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["Question", "Answer"])
        rows.writerows([[f"what is {i}", f"it is {i}"] for i in range(30)])
    assert main(["init", "--model", "model", "--data", "faq.csv", "--full"]) == 0
    capsys.readouterr()
    config = load("faq.yaml")
    assert config.lora is None
    assert dict(config.data.train[0].columns) == {"question": "Question", "answer": "Answer"}
    assert config.data.chat_template == "builtin:chatml.jinja"
    assert config.data.added_tokens == ["<|im_start|>", "<|im_end|>"]
    assert main(["inspect", "faq.yaml", "--json", "--rows", "1"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[0])["summary"]
    assert (summary["kept"], summary["stop_token"]) == (30, "<|im_end|>")


def test_bad_rows(tiny, tmp_path, capsys):
    good, bad = {"question": "what", "answer": "it"}, {"question": "what", "answer": None}
    write_jsonl(tmp_path / "some.jsonl", [good] * 9 + [bad])
    write_jsonl(tmp_path / "all.jsonl", [good | {"tools": "none"}] * 3)
    for name, code in (("some", 0), ("all", 2)):
        out = tmp_path / f"{name}.yaml"
        arguments = ["init", "--model", str(tiny), "--data", str(tmp_path / f"{name}.jsonl"), "--out", str(out)]
        assert main(arguments) == code
        assert out.exists() == (code == 0)
    assert "all.jsonl row 0: " in capsys.readouterr().err
    assert load(tmp_path / "some.yaml").data.on_bad_row == "skip"


def test_a_config_for_other_hardware_is_compiled(tiny, chats, tmp_path):
    """In a process of its own, because the compiler of TPUs changes the platform."""
    for hardware, method in (("v5e-1", "--qlora"), ("v5e-4", "--full")):
        out = tmp_path / f"{hardware}.yaml"
        options = ["--data", chats, "--hardware", hardware, method, "--out", out]
        done = process("init", "--model", tiny, *options, XLA_FLAGS="")
        assert done.returncode == 0, done.stderr
        assert f"# plan v5e:{'1x1' if hardware == 'v5e-1' else '2x2'}: fits, peak " in out.read_text()
        load(out)
    done = process("init", "--model", tiny, "--data", chats, "--hardware", "v9-8", "--out", tmp_path / "a.yaml")
    assert (done.returncode, "--hardware: unknown chip in 'v9:8'" in done.stderr) == (2, True)


@given(
    st.integers(1, 2_000_000),
    st.lists(st.integers(2, 30_000), min_size=1, max_size=50),
    st.sampled_from([512, 8192, 131_072]),
    st.sampled_from([10**6, 8 * 10**9, 7 * 10**10]),
    st.sampled_from([1, 6, 8, 256]),
    st.sampled_from(METHODS),
)
def test_proposals_are_sane(count, lengths, positions, weights, devices, method):
    lengths = np.minimum(np.asarray(lengths), positions)
    facts = Facts(weights, positions, lengths, int(lengths.sum()), count, devices)
    values = {one.key: one.value for one in propose(facts, method)}
    assert values["data.max_length"] <= positions
    assert (lengths > values["data.max_length"]).sum() <= math.ceil(len(lengths) / 50)
    assert values["training.batch_size"] % devices == 0
    assert 1 <= values["training.num_train_epochs"] <= 10
    assert ("lora" in values) == (method == "full")
    assert values["optimizer.learning_rate"] <= (2e-5 if method == "full" else 2e-4)
    assert values["training.save_every"] >= 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train"], 2, "sft-jax: train needs a config: sft-jax train builtin:quickstart trains an example"),
        (["train", "lr=3"], 2, "lr=3: the config comes before key=value"),
        (["train", "configs/nope/quickstart.yaml"], 2, "the one that comes with the package is builtin:quickstart"),
        (["train", "builtin:nope"], 2, "builtin:nope: no such built-in config"),
        (["recipes", "llama", "v5e"], 0, "llama-3.1-8b-lora-v5e-16"),
        (["recipes", "llama", "zx81"], 2, "no recipe has 'llama' and 'zx81'"),
        (["plan", "builtin:quickstart"], 2, "--topology: is missing, and this machine has no accelerator"),
    ],
)
def test_how_to_begin(arguments, code, said, capsys):
    assert main(arguments) == code
    assert said in "".join(capsys.readouterr())


def test_recipes_as_json(capsys):
    assert main(["recipes", "qwen3-0.6b", "--json"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["model"], row["topology"]) == ("Qwen/Qwen3-0.6B", "a100-40g:1")
    assert load("builtin:qwen3-0.6b-lora-1gpu", ["data.train=a.jsonl"]).data.train[0].path == "a.jsonl"


@pytest.mark.parametrize("sources", ["a.jsonl", ["a.jsonl", {"path": "b.jsonl", "weight": 2}], {"path": "a.jsonl"}])
def test_a_path_stands_for_a_source(sources, tmp_path):
    file = tmp_path / "a.yaml"
    values = {"model": {"path": "m"}, "training": {"output_dir": "r"}, "data": {"train": sources}}
    file.write_text(yaml.safe_dump(values))
    train = load(file, ["data.eval=[c.jsonl]"]).data
    assert train.train[0].path == "a.jsonl"
    assert train.eval[0].path == "c.jsonl"
    if isinstance(sources, list):
        assert train.train[1].weight == 2


def test_a_run_directory_stands_for_its_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moved run").mkdir()
    values = {"model": {"path": "m"}, "training": {"output_dir": "elsewhere"}, "data": {"train": "a.jsonl"}}
    (tmp_path / "moved run" / "config.yaml").write_text(yaml.safe_dump(values))
    assert load("moved run").training.output_dir == "moved run"
