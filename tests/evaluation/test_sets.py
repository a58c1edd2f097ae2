"""Sets of held-out data: sources with one label, measured together and apart from the others."""

import dataclasses
import json

import numpy as np
import pytest
from kit import conversations, make_model, one_device, run_config, sft_jax, write_jsonl

from sft_jax import config_file as configs
from sft_jax.config import EvaluationConfig, SourceConfig
from sft_jax.errors import UserError
from sft_jax.evaluation.questions import _spread
from sft_jax.run.train import train


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run with labelled training data and three held-out files in two sets."""
    folder = tmp_path_factory.mktemp("sets")
    files = {name: write_jsonl(folder / f"{name}.jsonl", conversations(n, seed=n)) for name, n in
             {"train": 20, "more": 12, "a": 3, "b": 5, "c": 7}.items()}  # fmt: skip
    labels = {"a": "math", "b": "math", "c": None}
    config = run_config(
        tiny,
        files["train"],
        folder / "run",
        data__train=[SourceConfig(str(files["train"]), label="first"), SourceConfig(str(files["more"]))],
        data__eval=[SourceConfig(str(files[name]), label=label) for name, label in labels.items()],
        training__max_steps=3,
        evaluation=EvaluationConfig(at_end=True, max_new_tokens=8, shots=1),
    )
    train(config, one_device())
    configs.save(config, folder / "config.yaml")
    return folder, config, files


def test_each_set_has_its_metrics(run):
    folder, _, files = run
    summary = json.loads((folder / "run" / "report" / "summary.json").read_text())
    names = {"math", str(files["c"])}
    for column in ("base", "tuned"):
        whole, sets = summary[column], summary[column]["sets"]
        assert set(sets) == names
        assert sum(one["num_questions"] for one in sets.values()) == whole["num_questions"] == 15
        assert sets["math"]["num_questions"] == 8
        assert len({one["loss"] for one in sets.values()}) == 2
        num_targets = [one["num_targets"] for one in sets.values()]
        np.testing.assert_allclose(
            np.average([one["loss"] for one in sets.values()], weights=num_targets), whole["loss"], rtol=1e-6
        )
        for key in ("exact_match", "stop_rate"):
            of_sets = [one[key] * one["num_questions"] for one in sets.values()]
            np.testing.assert_allclose(sum(of_sets) / 15, whole[key], rtol=1e-6)
    assert set(summary["few_shot"]["sets"]) == names
    rows = [json.loads(line) for line in (folder / "run" / "report" / "answers.jsonl").read_text().splitlines()]
    assert [row["set"] for row in rows] == ["math"] * 8 + [str(files["c"])] * 7
    held_out = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert set(held_out[1]["source_loss"]) == {"first", str(files["more"])}
    assert set(held_out[0]["eval_source_loss"]) == names
    last = held_out[-1]["eval_source_loss"]
    np.testing.assert_allclose(last["math"], summary["tuned"]["sets"]["math"]["loss"], rtol=1e-5)


def test_the_sets_in_tables(run):
    folder, config, files = run
    done = sft_jax("evaluate", folder / "config.yaml", "evaluation.shots=0")
    assert done.returncode == 0, done.stderr
    assert f"math: {files['a']}: messages, 3 kept" in done.stderr
    text = done.stdout.splitlines()
    at = text.index("  exact match, by set")
    assert text[at + 1].startswith("  math (8 questions)")
    assert [title for title in text if title.endswith(", by set")] == [
        "  exact match, by set", "  stops by itself, by set", "  loss per target token, by set"
    ]  # fmt: skip
    page = (folder / "run" / "report" / "report.html").read_text()
    assert "loss per target token, by set" in page
    assert f"math: {files['b']}" in page
    one_set = [dataclasses.replace(source, label="all") for source in config.data.eval]
    configs.save(dataclasses.replace(config, data=dataclasses.replace(config.data, eval=one_set)), folder / "one.yaml")
    assert "sets" not in json.loads(sft_jax("evaluate", folder / "one.yaml", "--json").stdout)["tuned"]


def test_a_label_does_not_change_a_run(run):
    """A run resumes with other labels; with another file it does not."""
    folder, _, files = run
    again = sft_jax("train", folder / "config.yaml", "data.train.0.label=second", "training.save_every=7")
    assert again.returncode == 0, again.stderr
    other = sft_jax("train", folder / "config.yaml", f"data.train.0.path={files['a']}")
    assert other.returncode == 2
    assert "holds a run with data.train=" in other.stderr


def test_inspect_names_labels(run):
    folder, _, files = run
    summary = json.loads(sft_jax("inspect", folder / "config.yaml", "--json", "--rows", "0").stdout)["summary"]
    assert [one["label"] for one in summary["sources"]] == ["first", None]
    shown = sft_jax("inspect", folder / "config.yaml", "--rows", "0").stdout
    assert "  first: …" in shown
    assert str(files["train"])[-30:] in shown


def test_a_set_without_examples(tmp_path):
    """A set whose rows are all too long has no loss, and the others keep theirs."""
    model = make_model(tmp_path / "model")
    short = write_jsonl(tmp_path / "short.jsonl", conversations(4))
    words = [{"question": "Which river?", "answer": "seven bridges " * 60}]
    config = run_config(
        model,
        short,
        tmp_path / "run",
        data__eval=[
            SourceConfig(str(short)),
            SourceConfig(str(write_jsonl(tmp_path / "long.jsonl", words)), label="long"),
        ],
        training__max_steps=1,
        evaluation=EvaluationConfig(at_end=True, max_new_tokens=4),
    )
    train(config, one_device())
    summary = json.loads((tmp_path / "run" / "report" / "summary.json").read_text())
    assert summary["tuned"]["sets"]["long"] == {"num_targets": 0}
    np.testing.assert_allclose(summary["tuned"]["sets"][str(short)]["loss"], summary["tuned"]["loss"])


@pytest.mark.smoke
def test_questions_are_shared_out_among_sets():
    assert _spread([0, 0, 0, 0, 0, 1, 2, 2, 2], 5) == [0, 4, 5, 6, 8]
    assert _spread([0] * 9, 3) == [0, 4, 8]
    assert _spread([0, 1, 2], 2) == [1, 2]


@pytest.mark.smoke
@pytest.mark.parametrize("label", ["", " ", "two\nlines"])
def test_labels_that_are_refused(label):
    with pytest.raises(UserError, match=r"data\.\*\.label"):
        SourceConfig("a.jsonl", label=label)
