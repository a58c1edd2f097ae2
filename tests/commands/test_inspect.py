"""What ``sft-jax inspect`` shows is what is trained, and it refuses what ``train`` refuses."""

import dataclasses
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from kit import conversations, one_device, run_config, sft_jax, write_jsonl

from sft_jax import config_file as configs
from sft_jax.config import EvaluationConfig, SourceConfig
from sft_jax.data.batches.packing import plan_run
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens.examples import encode_sources
from sft_jax.errors import UserError
from sft_jax.hf.hub import find_model
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.run.inspect import inspect
from sft_jax.run.train import train


@pytest.fixture
def config(tiny, tmp_path):
    rows = conversations(50)
    rows[3]["messages"][-1]["content"] = "market " * 300
    rows[4]["messages"][-1]["weight"] = 0.5
    return run_config(tiny, write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "run")


def test_no_weights_are_fetched(config, tiny, monkeypatch, capsys):
    """Of a Hugging Face id, against a stand-in of the one call that is made."""
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options["ignore_patterns"]))
        return tiny

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    inspect(dataclasses.replace(config, model=dataclasses.replace(config.model, path="some/model")), rows=1)
    find_model("some/model")
    assert [(name, "*.safetensors" in left_out) for name, left_out in asked] == [
        ("some/model", True),
        ("some/model", False),
    ]


def test_json_is_what_is_trained(config, tiny, capsys):
    inspect(config, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    summary, rows = lines[0]["summary"], lines[1:]
    tokenizer, _ = load_tokenizer(tiny)
    examples, _ = encode_sources(open_sources(config.data.train), Encoder(tokenizer, stop_ids=(2,)), 128)
    assert [row["row"] for row in rows] == examples.row.tolist() == [*range(3), *range(4, 50)]
    assert {row["source"] for row in rows} == {config.data.train[0].path}
    for i, row in enumerate(rows):
        ids, mask = examples[i]
        assert row["input_ids"] == ids.tolist()
        assert row["loss_mask"] == mask.tolist()
    assert {type(one) for row in rows[:3] for one in row["loss_mask"]} == {int}
    assert 0.5 in rows[3]["loss_mask"]
    plan = plan_run(examples.num_tokens, 128, 4, 1)
    assert summary["rows"] == 50
    assert summary["kept"] == 49
    assert summary["dropped"] == {"longer than data.max_length": 1}
    assert summary["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert summary["targets"] == sum(np.count_nonzero(row["loss_mask"][1:]) for row in rows)
    assert summary["stop_token"] == "<|im_end|>"
    assert summary["steps_per_epoch"] == plan.num_steps
    assert summary["steps"] == 6
    np.testing.assert_allclose(summary["packing_efficiency"], examples.num_tokens.sum() / (len(plan.rows) - 1) / 128)
    assert sum(one["count"] for one in summary["lengths"]) == 50
    assert summary["lengths"][-1]["count"] == 1
    # of all 50: the overlong one was encoded too
    assert summary["tokens_by_role"]["assistant"] == summary["targets_by_role"]["assistant"]
    assert set(summary["tokens_by_role"]) == {"assistant", "user", "system", "template"}


def test_an_epoch_sees_rows_as_often_as_their_weight_says(config, capsys):
    """Twice the rows of a source are twice the rows of an epoch."""

    def summary_of(weight):
        source = dataclasses.replace(config.data.train[0], weight=weight)
        data = dataclasses.replace(config.data, train=[source], packing=False)
        inspect(dataclasses.replace(config, data=data), as_json=True)
        return json.loads(capsys.readouterr().out.splitlines()[0])["summary"]

    once, twice = summary_of(1.0), summary_of(2.0)
    assert (once["packed_rows"], twice["packed_rows"]) == (49, 98)
    assert (once["steps_per_epoch"], twice["steps_per_epoch"]) == (13, 25)
    assert 0 < twice["packing_efficiency"] <= 1
    rarely = summary_of(0.001)  # an epoch has none of its rows
    assert (rarely["packed_rows"], rarely["steps_per_epoch"], rarely["packing_efficiency"]) == (0, 0, 0.0)


def test_text_shows_the_mask(config, capsys, monkeypatch):
    inspect(config, rows=2)
    shown = capsys.readouterr().out
    answers = [m["content"] for row in conversations(2) for m in row["messages"] if m["role"] == "assistant"]
    for text in answers:
        assert f"⟦{text}<|im_end|>⟧" in shown
    assert shown.count("⟦") == len(answers)
    assert "a.jsonl row 1: " in shown
    assert "ends with '<|im_end|>'" in shown
    assert "1  longer than data.max_length" in shown
    monkeypatch.setenv("FORCE_COLOR", "1")
    inspect(config, rows=1)
    shown = capsys.readouterr().out
    assert f"\x1b[30;42m{answers[0]}\x1b[0m\x1b[30;43m<|im_end|>\x1b[0m" in shown
    assert "⟦" not in shown


def test_what_is_not_read_is_shown_for_each_source(config, tmp_path, capsys):
    """In the text, the page and the figures, and when training starts."""
    folder = tmp_path / "rows"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [row | {"topic": "rivers"} for row in conversations(6)])
    write_jsonl(folder / "test.jsonl", conversations(1))
    plain = write_jsonl(tmp_path / "plain.jsonl", conversations(3, seed=1))
    sources = [SourceConfig(path=str(folder)), SourceConfig(path=str(plain))]
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=sources))
    lines = [f"{folder}/train.jsonl: topic (6 rows)", f"files of other splits next to {folder}/train.jsonl: test.jsonl"]
    summary = inspect(config, rows=0, html=tmp_path / "page.html")
    shown, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    assert summary["not_read"] == lines
    assert [source["not_read"] for source in summary["sources"]] == [{"topic": 6}, {}]
    train(dataclasses.replace(config, training=dataclasses.replace(config.training, max_steps=1)), one_device())
    said = capsys.readouterr().err
    for line in lines:
        assert f"  {line}" in shown
        assert f"<li>{line}</li>" in page
        assert f"not read  {line}" in said


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.trained, self.links, self.tags, self._inside = [], [], set(), False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.add(tag)
        self.links += [given[name] for name in ("href", "src") if given.get(name)]
        self._inside = tag == "i" and given.get("class") == "on"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.trained.append(data)


def test_page_needs_nothing_else(config, tmp_path, capsys):
    inspect(config, rows=1, html=tmp_path / "data.html")
    page = Page((tmp_path / "data.html").read_text())
    answers = [m["content"] for m in conversations(1)[0]["messages"] if m["role"] == "assistant"]
    assert "".join(page.trained).startswith(answers[0] + "<|im_end|>")
    assert "script" not in page.tags
    assert "svg" in page.tags
    assert not [link for link in page.links if not link.startswith("#")]
    with pytest.raises(UserError, match=r"--html: .* is no folder"):
        inspect(config, html=tmp_path / "absent" / "data.html")
    capsys.readouterr()


def bad_rows(tmp_path):
    rows = [*conversations(3), {"messages": [{"role": "user", "content": "a"}]}]
    return {"data__train": [SourceConfig(str(write_jsonl(tmp_path / "bad.jsonl", rows)))]}


@pytest.mark.parametrize(
    "changes",
    [
        bad_rows,
        lambda path: {"data__max_length": 4},
        lambda path: {"data__overlong": "error"},
        lambda path: {"data__stop_token": "<|nope|>"},
        lambda path: {"data__train": [SourceConfig("absent.jsonl")]},
        lambda path: {"data__eval": bad_rows(path)["data__train"]},
        lambda path: {"data__overlong": "truncate", "data__max_length": 600, "model__path": ""},
        lambda path: bad_rows(path) | {"data__eval": [SourceConfig(str(path / "a.jsonl"))],
                                       "evaluation": EvaluationConfig(at_end=True, shots=900)},
    ],
    ids=["row", "all too long", "one too long", "stop", "absent", "eval", "positions", "shots"],
)  # fmt: skip
def test_it_refuses_what_train_refuses(tiny, tmp_path, changes, capsys):
    rows = conversations(50)
    rows[3]["messages"][-1]["content"] = "market " * 700
    write_jsonl(tmp_path / "a.jsonl", rows)
    given = changes(tmp_path)
    if "model__path" in given:
        given["model__path"] = str(tiny)
    config = run_config(tiny, tmp_path / "a.jsonl", tmp_path / "run", **given)
    with pytest.raises(UserError) as by_train:
        train(config, one_device())
    with pytest.raises(UserError) as by_inspect:
        inspect(config, as_json=True)
    assert str(by_inspect.value) == str(by_train.value)
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_listed_then_refused_or_skipped(tiny, tmp_path):
    config = run_config(tiny, out=tmp_path / "run", **bad_rows(tmp_path))
    configs.save(config, tmp_path / "a.yaml")
    refused = sft_jax("inspect", tmp_path / "a.yaml")
    assert refused.returncode == 2
    assert "bad.jsonl row 3: no assistant message to train on" in refused.stdout
    assert refused.stderr.splitlines()[-1].endswith("bad.jsonl row 3: no assistant message to train on")
    assert "Traceback" not in refused.stderr
    skipped = sft_jax("inspect", tmp_path / "a.yaml", "data.on_bad_row=skip", "--rows", "1")
    assert skipped.returncode == 0, skipped.stderr
    assert "1  no assistant message to train on" in skipped.stdout
