"""The training examples with the highest loss: wrong labels are among them."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
from kit import conversations, one_device, run_config, sft_jax, write_jsonl

from sft_jax import builtin, config_file
from sft_jax.assembly import open_model
from sft_jax.config import EvaluationConfig, SourceConfig
from sft_jax.errors import UserError
from sft_jax.evaluation import hardest as module
from sft_jax.evaluation.hardest import candidates
from sft_jax.evaluation.score import score
from sft_jax.report.page import _share
from sft_jax.run.train import train


def read(run):
    return [json.loads(line) for line in (run / "report" / "hardest.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def mislabelled(tmp_path_factory):
    """A run of the built-in model on 200 questions, 10 of which have the answers of others."""
    folder = tmp_path_factory.mktemp("hardest")
    file = Path(builtin.__file__).parent / "countries" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()[:200]]
    wrong = random.Random(0).sample(range(200), 10)
    answers = [rows[i]["messages"][1] for i in wrong]
    for i, answer in zip(wrong, answers[1:] + answers[:1], strict=True):
        rows[i]["messages"][1] = answer
    config = run_config(
        "builtin:tiny",
        write_jsonl(folder / "train.jsonl", rows),
        folder / "run",
        data__eval=[SourceConfig("builtin:countries/unknown.jsonl")],
        optimizer__learning_rate=1e-3,
        training__max_steps=30,
        training__batch_size=8,
        evaluation=EvaluationConfig(at_end=True, max_new_tokens=4, num_questions=4, hardest=20),
    )
    train(config, one_device())
    config_file.save(config, folder / "config.yaml")
    return folder, config, rows, set(wrong)


def test_wrong_labels_are_found(mislabelled):
    """Twenty of 200 examples hold at least 8 of the 10 wrong ones; by chance they would hold one."""
    folder, _, rows, wrong = mislabelled
    listed = read(folder / "run")
    assert len(listed) == 20
    assert len(wrong & {one["row"] for one in listed}) >= 8
    assert [one["loss"] for one in listed] == sorted((one["loss"] for one in listed), reverse=True)
    for one in listed:
        question, answer = (message["content"] for message in rows[one["row"]]["messages"])
        assert question in one["prompt"]
        assert answer in one["answer"]


def test_losses_are_those_of_score(mislabelled):
    folder, _, rows, _ = mislabelled
    model = open_model(str(folder / "run"), devices=one_device())
    for one in read(folder / "run")[:3]:
        messages = rows[one["row"]]["messages"]
        (scored,) = score(model, [{"prompt": messages[:1], "completion": messages[1:]}])
        assert scored.num_tokens == one["num_targets"]
        np.testing.assert_allclose(-scored.per_token, one["loss"], rtol=1e-4)
        losses = [token["loss"] for token in one["tokens"]]
        assert losses == sorted(losses, reverse=True)
        ids = model.tokenizer(one["prompt"] + one["answer"])["input_ids"]
        for token in one["tokens"]:
            assert model.tokenizer.decode(ids[token["position"]]) == token["text"]


def test_evaluate_lists_the_same(mislabelled):
    folder, config, *_ = mislabelled
    before = read(folder / "run")
    done = sft_jax("evaluate", folder / "config.yaml", "evaluation.hardest=5")
    assert done.returncode == 0, done.stderr
    assert "  hardest  the 5 training examples with the highest loss, among 200 examples" in done.stderr
    after = read(folder / "run")
    assert [one["row"] for one in after] == [one["row"] for one in before[:5]]
    assert "training examples with the highest loss" in done.stdout
    assert sum(f"{config.data.train[0].path[-20:]} row" in line for line in done.stdout.splitlines()) == 3


def test_a_stream_reads_its_first_rows(tiny, tmp_path):
    """Texts from the data are escaped on the page."""
    rows = [{"question": row["messages"][0]["content"], "answer": "seven"} for row in conversations(10)]
    rows.append({"question": "<script>alert(1)</script>", "answer": "<b>&amp; \U0001f9d1</b>"})
    file = write_jsonl(tmp_path / "<i>.jsonl", rows)
    config = run_config(
        tiny,
        file,
        tmp_path / "run",
        data__eval=[SourceConfig(str(file))],
        training__max_steps=2,
        evaluation=EvaluationConfig(at_end=True, max_new_tokens=4, num_questions=2, hardest=1),
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, streaming=True))
    config_file.save(config, tmp_path / "config.yaml")
    done = sft_jax("train", tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert "among 11 examples from the first rows of the stream; later rows are not read" in done.stderr
    (one,) = read(tmp_path / "run")
    assert one["row"] == 10
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert "<script>" not in page
    assert "<b>&amp;" not in page
    assert "&lt;i&gt;.jsonl row 10" in page
    assert 'class="hard"' in page


@pytest.mark.smoke
def test_the_examples_that_are_read(monkeypatch):
    from sft_jax.data.chat.encoded import Encoded
    from sft_jax.data.tokens.examples import join

    examples = join([Encoded(np.asarray([i, 1, 2]), np.asarray([0, 1, 1])) for i in range(10)], "rows")
    assert candidates(examples) is examples
    monkeypatch.setattr(module, "MOST_EXAMPLES", 4)
    few = candidates(examples)
    assert few.row.tolist() == [0, 3, 6, 9]
    assert few[1][0].tolist() == [3, 1, 2]


@pytest.mark.smoke
def test_bounds():
    assert (_share(0.0), _share(100.0)) == (0, 70)
    for hardest in (-1, 1001):
        with pytest.raises(UserError, match=r"evaluation\.hardest"):
            EvaluationConfig(hardest=hardest)
