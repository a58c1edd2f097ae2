"""Evaluation of runs: report, samples, comparison with the base, and the commands evaluate and score."""

import dataclasses
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from kit import (
    conversations,
    one_device,
    run_config,
    sft_jax,
    write_jsonl,
)

from sft_jax import config_file as configs
from sft_jax.assembly import open_model
from sft_jax.cli import main
from sft_jax.config import EvaluationConfig, SourceConfig
from sft_jax.errors import UserError
from sft_jax.evaluation.metrics import answer_metrics
from sft_jax.evaluation.score import score
from sft_jax.run.evaluate import evaluate
from sft_jax.run.train import train


@pytest.fixture(scope="module")
def evaluated(tiny, chats, tmp_path_factory):
    """A run that evaluates at its end, with samples, few-shot prompts and documents."""
    folder = tmp_path_factory.mktemp("evaluated")
    held_out = write_jsonl(folder / "held_out.jsonl", conversations(12, seed=5))
    documents = write_jsonl(folder / "documents.jsonl", [{"text": f"river {'bridge ' * i}"} for i in range(2, 9)])
    config = run_config(
        tiny,
        chats,
        folder / "run",
        data__eval=[SourceConfig(str(held_out))],
        training__tensorboard=True,
        training__max_steps=10,
        evaluation=EvaluationConfig(
            at_end=True,
            documents=[SourceConfig(str(documents))],
            max_new_tokens=16,
            shots=2,
            samples=["Which river?", "<b>bread</b> & more"],
            samples_every=5,
        ),
    )
    last = train(config, one_device())
    configs.save(config, folder / "config.yaml")
    return folder, config, last


class Page(HTMLParser):
    """The references of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action", "srcset")]

    def handle_data(self, data):
        self.text.append(data)


def test_report_at_the_end_of_training(evaluated):
    folder, config, last = evaluated
    report = folder / "run" / "report"
    summary = json.loads((report / "summary.json").read_text())
    tuned = json.loads((report / "tuned.json").read_text())
    assert tuned == {"step": 10, "data": [one.path for one in config.data.eval], "metrics": summary["tuned"]}
    for name in ("base", "tuned"):
        assert summary[name].keys() >= {
            "loss",
            "perplexity",
            "token_accuracy",
            "exact_match",
            "stop_rate",
            "stop_probability",
            "document_perplexity",
        }
    assert summary["few_shot"]["shots"] == 2
    assert summary["tuned"]["loss"] < summary["base"]["loss"]
    assert summary["tuned"]["document_kl"] > 0
    np.testing.assert_allclose(summary["tuned"]["loss"], last["eval_loss"], rtol=1e-5)
    rows = [json.loads(line) for line in (report / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    for name in ("base", "tuned", "few_shot"):
        assert np.mean([row[name]["right"] for row in rows]) == summary[name]["exact_match"]
        assert np.mean([row[name]["stopped"] for row in rows]) == summary[name]["stop_rate"]
    text = (report / "report.html").read_text()
    page = Page(text)
    assert not [ref for ref in page.references if not ref.startswith("#")]
    assert "@import" not in text
    assert "url(http" not in text
    assert page.tags.count("svg") == 3
    assert not (report / "hardest.jsonl").exists()
    assert "script" not in page.tags
    assert rows[0]["question"] in "".join(page.text)


def test_samples_during_training(evaluated):
    folder, config, _ = evaluated
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    samples = {row["step"]: row["samples"] for row in rows if "samples" in row}
    assert list(samples) == [0, 5, 10]
    assert [sample["prompt"] for sample in samples[5]] == config.evaluation.samples
    assert samples[0] != samples[10]
    model = open_model(str(folder / "run"), devices=one_device())
    from sft_jax.run.generate import generate

    for sample, (one, text) in zip(samples[10], generate(model, config.evaluation.samples, 16), strict=True):
        assert sample["finish_reason"] == one.finish_reason
        assert text == sample["text"]
    events = b"".join(f.read_bytes() for f in (folder / "run" / "tensorboard").iterdir())
    assert b"samples/1" in events
    assert b"final/tuned/exact_match" in events
    assert b"final/base/loss" in events


def test_evaluate_command_gives_the_same_results(evaluated, tmp_path):
    folder, _, _ = evaluated
    report = folder / "run" / "report"
    before = json.loads((report / "summary.json").read_text())
    done = sft_jax("evaluate", folder / "config.yaml", "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert again["few_shot"].pop("form") == "chat"
    for name, metrics in again.items():
        for key, value in metrics.items():
            np.testing.assert_allclose(value, before[name][key], rtol=1e-4, atol=1e-7, err_msg=f"{name} {key}")
    table = sft_jax("evaluate", folder / "config.yaml", "evaluation.shots=0", "evaluation.num_questions=5")
    assert "5 held-out questions" in table.stdout
    assert "few" not in table.stdout
    for line in ("exact match", "stops by itself", "perplexity of documents", "KL to the base"):
        assert line in table.stdout


def test_full_and_added_tokens_compare_with_the_true_base(tiny, chats, evaluated, tmp_path):
    """A full run, and a run with added embeddings, are compared with the original base model."""
    folder, config, _ = evaluated
    reference = json.loads((folder / "run" / "report" / "summary.json").read_text())["base"]
    for name, changes in {"full": {"lora": None}, "added": {"data__added_tokens": ["<|new|>"]}}.items():
        changed = run_config(
            tiny,
            chats,
            tmp_path / name,
            data__eval=config.data.eval,
            training__max_steps=3,
            evaluation=dataclasses.replace(config.evaluation, samples=[], shots=0),
            **changes,
        )
        train(changed, one_device())
        in_training = json.loads((tmp_path / name / "report" / "summary.json").read_text())
        afterwards = evaluate(changed, devices=one_device()).summary
        for key, value in in_training["tuned"].items():
            np.testing.assert_allclose(afterwards["tuned"][key], value, rtol=1e-5, err_msg=f"{name} {key}")
        tolerance = 1e-5 if name == "full" else 0.05  # an added token takes a little probability from the others
        np.testing.assert_allclose(in_training["base"]["loss"], reference["loss"], rtol=tolerance)


def test_score_is_transformers_log_likelihood(tiny):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    opened = open_model(str(tiny), devices=one_device())
    tokenizer = opened.tokenizer
    rows = [
        {"prompt": "Which river?", "responses": ["seven bridges", "quiet", "copper market garden"]},
        {"prompt": [{"role": "user", "content": "bread"}], "chosen": "yes", "rejected": "no, silver"},
        {"prompt": "north ", "completion": "winter"},
    ]
    scores = score(opened, rows)
    assert [(one.row, one.candidate) for one in scores] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    for one in scores:
        prompt = rows[one.row]["prompt"]
        user = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        start = tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=True)["input_ids"]
        end = tokenizer(f"{one.response}<|im_end|>")["input_ids"]
        ids = torch.tensor([start + end])
        with torch.no_grad():
            log_probs = model(ids).logits.log_softmax(-1)[0, len(start) - 1 : -1]
        expected = log_probs[torch.arange(len(end)), torch.tensor(end)].sum().item()
        assert one.num_tokens == len(end)
        np.testing.assert_allclose(one.log_likelihood, expected, atol=1e-3)
    raw = score(opened, rows[2:], raw=True)[0]
    assert raw.num_tokens == len(tokenizer("winter")["input_ids"]) + 1


def test_score_command(tiny, tmp_path):
    rows = [{"prompt": "Which river?", "responses": ["seven", "quiet bridge"]}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    done = sft_jax("score", tiny, file, "--json")
    assert done.returncode == 0, done.stderr
    rows_printed = [json.loads(line) for line in done.stdout.splitlines()]
    expected = score(open_model(str(tiny), devices=one_device()), rows)
    for row, one in zip(rows_printed, expected, strict=True):
        assert row.keys() == {"row", "candidate", "log_likelihood", "num_tokens"}
        np.testing.assert_allclose(row["log_likelihood"], one.log_likelihood, atol=1e-3)
    best = max(expected, key=lambda one: one.log_likelihood).response
    starred = [line for line in sft_jax("score", tiny, file).stdout.splitlines() if " * " in line]
    assert len(starred) == 1
    assert repr(best) in starred[0]


def test_bad_input(tiny, chats, evaluated, tmp_path, capsys):
    folder, _config, _ = evaluated
    run, held_out = folder / "run", folder / "held_out.jsonl"
    missing = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    (tmp_path / "empty.jsonl").write_text("")
    evaluate = ["evaluate", folder / "config.yaml", "training.batch_size=8"]  # one sequence per device of this process
    for arguments, words in (
        ([*evaluate, f"training.output_dir={tmp_path / 'gone'}"], "not a run directory"),
        ([*evaluate, "data.eval=[]", "evaluation.at_end=false"], "data.eval: names no source"),
        ([*evaluate, f"data.eval.0.path={tmp_path / 'empty.jsonl'}"], "has no rows"),
        ([*evaluate, "evaluation.shots=90"], "data.train has 40"),
        ([*evaluate, "evaluation.shots=30"], "the model has 512 positions; use fewer"),
        ([*evaluate, "--step", "3"], "no checkpoint of step 3"),
        (["score", run, missing], "row 0: has neither 'responses'"),
        (["score", run, tmp_path / "empty.jsonl"], "has no rows"),
        (["score", run, held_out], "has neither"),
    ):
        assert main([*map(str, arguments)]) == 2
        errors = capsys.readouterr().err
        assert words in errors.splitlines()[-1], errors
        assert "Traceback" not in errors
    with pytest.raises(UserError, match=r"evaluation\.at_end: there is nothing to evaluate on"):
        run_config(tiny, chats, tmp_path / "run", evaluation=EvaluationConfig(at_end=True))
    with pytest.raises(UserError, match=r"evaluation\.samples_every: 0"):
        EvaluationConfig(samples_every=0)


def test_answer_metrics():
    from sft_jax.evaluation.metrics import Answered

    answers = [Answered("a", True, True, 4), Answered("b", False, True, 2)]
    assert answer_metrics(answers) == {"exact_match": 0.5, "stop_rate": 1.0, "mean_length": 3.0, "num_questions": 2}
