"""The quickstart gives the results that the README reports."""

import json

import pytest
from kit import ROOT, one_device

from sft_jax import builtin
from sft_jax import config_file as configs
from sft_jax.assembly import open_model
from sft_jax.evaluation.answers import same_answer
from sft_jax.run.generate import generate
from sft_jax.run.train import train

HELD_OUT = builtin.locate("builtin:countries/heldout.jsonl", "test")


@pytest.mark.drill("sft_jax", "configs/quickstart.yaml")
def test_quickstart(tmp_path, capsys):
    """The config reaches the figures in the README."""
    config = configs.load(ROOT / "configs" / "quickstart.yaml", [f"training.output_dir={tmp_path / 'run'}"])
    train(config, one_device())
    summary = json.loads((tmp_path / "run" / "report" / "summary.json").read_text())
    base, tuned = summary["base"], summary["tuned"]
    assert base["exact_match"] <= 0.05
    assert tuned["exact_match"] >= 0.95
    assert tuned["stop_rate"] >= 0.99
    assert tuned["document_perplexity"] <= 1.5 * base["document_perplexity"]
    held_out = {
        tuple(m["content"] for m in row["messages"]) for row in map(json.loads, HELD_OUT.read_text().splitlines())
    }
    rows = [json.loads(line) for line in (tmp_path / "run" / "report" / "answers.jsonl").read_text().splitlines()]
    assert {(row["question"], row["answer"]) for row in rows} == held_out
    for row in rows:
        assert row["tuned"]["right"] == same_answer(row["tuned"]["text"], row["answer"], "text")
    printed = capsys.readouterr().out
    for words in ("exact match", "stops by itself", "perplexity of documents", "does not stop", "base, 4-shot"):
        assert words in printed
    # the run generates the answers in the report
    opened = open_model(str(tmp_path / "run"), devices=one_device())
    sample = rows[::60]
    answers = generate(opened, [row["question"] for row in sample], 24)
    assert [text.strip() for _, text in answers] == [row["tuned"]["text"] for row in sample]
