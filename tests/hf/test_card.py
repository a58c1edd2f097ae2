"""Model cards, read with the reader of huggingface_hub; their code runs."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from kit import make_model, one_device, run_config

from sft_jax.hf.card import Exported, license_of, model_card
from sft_jax.hf.hub import find_card
from sft_jax.run.export import export
from sft_jax.run.train import train

RESULTS = {"loss": 1.25, "perplexity": 3.49, "token_accuracy": 0.5, "exact_match": 0.25, "answer": None}


def read(text: str, folder) -> ModelCard:
    (folder / "README.md").write_text(text, encoding="utf-8")
    return ModelCard.load(folder / "README.md")


def test_metadata_is_what_the_hub_reads(tmp_path):
    config = run_config("Qwen/Qwen3-0.6B", "openai/gsm8k", tmp_path)
    model = Exported(
        "someone/tuned", "adapter", 3, "bfloat16", results=RESULTS,
        measured_on=["openai/gsm8k", "/private/held_out.jsonl"],
        license={"license": "other", "license_name": "qwen", "license_link": "https://example.org/LICENSE"},
    )  # fmt: skip
    card = read(model_card(config, model), tmp_path)
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert (data.base_model, data.to_dict()["base_model_relation"]) == ("Qwen/Qwen3-0.6B", "adapter")
    assert data.datasets == ["openai/gsm8k"]
    assert (data.license, data.license_name, data.license_link) == ("other", "qwen", "https://example.org/LICENSE")
    assert data.tags == ["sft", "sft-jax", "lora"]
    assert data.model_name == "tuned"
    results = {one.metric_type: one.metric_value for one in data.eval_results}
    assert results == {"exact_match": 0.25, "accuracy": 0.5, "loss": 1.25, "perplexity": 3.49}
    assert {(one.dataset_type, one.dataset_name) for one in data.eval_results} == {
        ("openai/gsm8k", "openai/gsm8k, held_out.jsonl")
    }
    assert "# tuned\n" in card.text
    assert "| exact match | 0.25 |" in card.text
    assert "private" not in card.content


def test_a_merged_model_of_a_folder(tmp_path):
    data = read(model_card(run_config(tmp_path, "a.jsonl"), Exported("out", "merged", 3, "float32")), tmp_path).data
    assert data.library_name == "transformers"
    for key in ("base_model", "base_model_relation", "datasets", "license", "model-index"):
        assert key not in data.to_dict()
    merged = model_card(run_config("org/base", "a.jsonl"), Exported("out", "merged", 3, "float32"))
    assert read(merged, tmp_path).data.to_dict()["base_model_relation"] == "finetune"


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Base\n", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: llama3.1\n---\n", {"license": "other", "license_name": "llama3.1"}),
        ("# No metadata\n", {}),
        ("---\nlicense: [a\n---\n", {}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\nlicense: 'a | b'\n---\n", {}),
        ("---\nlicense: " + "a" * 301 + "\n---\n", {}),
        ("---\na: &a [x]\nlicense: *a\n---\n", {}),
    ],
)
def test_the_license_is_that_of_the_base_models_card(tmp_path, text, license):
    (tmp_path / "README.md").write_text(text)
    assert license_of(find_card("org/base", tmp_path)) == license


def test_no_card_no_license(tmp_path):
    assert license_of(find_card("org/base", tmp_path)) == {}
    snapshot = tmp_path / "models--org--base" / "snapshots" / ("a" * 40)  # without its card, and offline
    snapshot.mkdir(parents=True)
    assert license_of(find_card("org/base", snapshot)) == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert license_of(find_card("org/base", tmp_path)) == {}


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_the_code_runs(chats, tmp_path, monkeypatch, capsys, form):
    base = make_model(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    config = run_config(base, chats, tmp_path / "run", training__max_steps=2)
    train(config, one_device())
    summary = tmp_path / "run" / "report" / "tuned.json"
    summary.write_text(json.dumps({"step": 2, "data": [str(chats)], "metrics": RESULTS}))
    export(tmp_path / "run", tmp_path / "out", form)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit"
    assert len(card.data.eval_results) == 4
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    capsys.readouterr()
    exec(compile(code.replace("max_new_tokens=128", "max_new_tokens=4"), "README.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out
    summary.write_text(json.dumps({"step": 1, "data": [str(chats)], "metrics": RESULTS}))
    export(tmp_path / "run", tmp_path / "other", form)
    assert not ModelCard.load(tmp_path / "other" / "README.md").data.eval_results
