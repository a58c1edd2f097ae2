"""Evaluation: likelihoods equal transformers', answers are compared as said, the report is whole and self-contained."""

import copy
import dataclasses
import json
import math
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from kit import (
    CHATML,
    CHATML_UNMARKED,
    conversations,
    load_model,
    logits,
    make_model,
    make_tokenizer,
    one_device,
    run_config,
    sft_jax,
    write_jsonl,
)

from sft_jax import config_file as configs
from sft_jax.assembly import open_model
from sft_jax.cli import main
from sft_jax.config import EvaluationConfig, SourceConfig
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.chat.pieces import pieces
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens.examples import encode_sources
from sft_jax.errors import UserError
from sft_jax.evaluation.answers import NORMALIZERS, same_answer
from sft_jax.evaluation.compare import answer_metrics, held_out_metrics
from sft_jax.evaluation.likelihood import Scorer
from sft_jax.evaluation.questions import Question, cut_at_blank_line, few_shot_prompts, last_run, questions
from sft_jax.evaluation.score import score
from sft_jax.hf.reader import TensorReader
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.run.evaluate import evaluate
from sft_jax.run.train import train
from sft_jax.sharding import make_mesh
from sft_jax.training.weights import build, load_weights


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("kind", "written", "gold", "same"),
    [
        ("text", "  The Danube. ", "danube", True),
        ("text", "Danube river", "danube", False),
        ("exact", " Danube\n", "Danube", True),
        ("exact", "danube", "Danube", False),
        ("number", "So he pays $1,200.00.", "1200", True),
        ("number", "3 boxes of 4", "12", False),
        ("number", "no number here", "none either", False),
        ("gsm8k", "5 + 7 = 12\n#### 12", "half of 24 is 12\n#### 12", True),
        ("gsm8k", "#### $1,450", "#### 1450", True),
        ("gsm8k", "the answer is 12", "#### 12", False),
        ("gsm8k", "#### -3.50", "#### -3.5", True),
        ("gsm8k", "#### 1.2.3", "#### 5", False),
        ("gsm8k", "#### 5...5", "#### 5", True),
        ("gsm8k", "#### 12345678901", "#### 12345678902", False),
        ("number", "-0.0", "0", True),
        ("choice", "(B) because A is wrong", "B", True),
        ("choice", "B.", "C", False),
        ("exact", "<think>A river?</think>\n\nDanube", "<think>Which one?</think>\n\nDanube", True),
        ("text", "<think>Danube</think>Rhine", "Danube", False),
    ],
)
def test_answers(kind, written, gold, same):
    assert same_answer(written, gold, kind) is same


@pytest.mark.smoke
def test_every_normaliser_can_be_configured():
    for kind in NORMALIZERS:
        assert EvaluationConfig(answer=kind).answer == kind
    with pytest.raises(UserError, match="exact, text, number, gsm8k, choice"):
        EvaluationConfig(answer="fuzzy")


def test_gsm8k_answers_are_found(data_dir):
    rows = [json.loads(line) for line in (data_dir / "gsm8k" / "test.jsonl").read_text().splitlines()]
    found = [NORMALIZERS["gsm8k"](row["answer"]) for row in rows]
    assert len(found) == 1319
    for row, number in zip(rows, found, strict=True):
        assert number is not None
        assert float(number) == float(row["answer"].split("####")[1].strip().replace(",", ""))


@pytest.mark.smoke
def test_worked_examples_of_the_docstrings():
    assert last_run(np.asarray([0, 1, 1, 0, 1, 1, 0], bool)) == (4, 6)
    assert last_run(np.asarray([1, 1], bool)) == (0, 2)
    asked = [Question([1], "", "3+3?", "6")]
    assert few_shot_prompts(asked, [("2+2?", "4")], 1, 0) == ["Question: 2+2?\nAnswer: 4\n\nQuestion: 3+3?\nAnswer:"]
    assert few_shot_prompts(asked, [], 0, 0) == ["Question: 3+3?\nAnswer:"]
    with pytest.raises(UserError, match=r"2 answered questions are wanted, data\.train has 1"):
        few_shot_prompts(asked, [("2+2?", "4")], 2, 0)
    assert cut_at_blank_line(" 6\n\nQuestion: 4+4?") == ("6", True)
    assert cut_at_blank_line(" 6\nof course") == ("6\nof course", False)


@pytest.fixture(scope="module")
def encoded(tiny, chats):
    tokenizer, _ = load_tokenizer(tiny)
    rows = open_sources([SourceConfig(str(chats))])
    return rows, encode_sources(rows, Encoder(tokenizer), 128)[0], tokenizer


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.smoke
@pytest.mark.parametrize("devices", [1, 8])
def test_scores_are_the_dense_ones(tiny, encoded, devices):
    """Packed, chunked and sharded, against one example at a time with all logits."""
    _, examples, _ = encoded
    model, _, _ = load_model(tiny)
    opened = open_model(str(tiny), devices=jax.devices()[:devices])
    scorer = Scorer(opened.split, 128, 8)
    scores = scorer.score(opened.params, opened.frozen, examples)
    for i in range(0, len(examples), 5):
        ids, _ = examples[i]
        dense = log_softmax(logits(model, ids[None])[0, :-1].astype(np.float64))
        where = slice(scores.starts[i], scores.starts[i + 1])
        np.testing.assert_allclose(scores.log_prob[where], dense[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
        assert (scores.correct[where] == (dense.argmax(-1) == ids[1:])).all()


def test_divergence_is_the_dense_one(tmp_path, encoded):
    _, examples, _ = encoded
    folder = make_model(tmp_path / "model")
    model, split, params = load_model(folder)
    other = jax.tree.map(lambda x: x * 1.05, params)
    scorer = Scorer(split, 128, 4)
    total, count = 0.0, 0
    for i in range(len(examples)):
        ids = examples[i][0]
        row = np.pad(ids, (0, 128 - len(ids)))[None]  # of one length: one compilation, and what follows changes nothing
        p, q = (
            log_softmax(logits(m, row)[0, : len(ids) - 1].astype(np.float64)) for m in (model, split.merge(other, {}))
        )
        total, count = total + (np.exp(p) * (p - q)).sum(), count + len(p)
    assert total / count > 1e-3
    np.testing.assert_allclose(scorer.divergence(params, other, {}, examples), total / count, rtol=1e-4)
    assert abs(scorer.divergence(params, params, {}, examples)) < 1e-6

    mesh = make_mesh(1, 2, 4, 1)
    spread = build(model.arch, mesh, None, "float32")
    params, _ = load_weights(spread, TensorReader(folder))
    other = jax.tree.map(lambda x: x * 1.05, params)
    np.testing.assert_allclose(Scorer(spread, 128, 4).divergence(params, other, {}, examples), total / count, rtol=1e-4)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "ending", ["'<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "'<|im_end|>\n' }}{% endgeneration %}"]
)
def test_metrics_by_hand(tiny, encoded, ending):
    """Also where the template's mark, and so what is trained, goes on behind the stop token."""
    rows, _, _ = encoded
    tokenizer, _ = load_tokenizer(tiny)
    tokenizer.chat_template = CHATML.replace("'<|im_end|>' }}{% endgeneration %}{{ '\n' }}", ending)
    examples, _ = encode_sources(rows, Encoder(tokenizer), 128)
    assert (examples[0][1][-1] > 0) == ending.startswith("'<|im_end|>\n")
    opened = open_model(str(tiny), devices=one_device())
    scores = Scorer(opened.split, 128, 4).score(opened.params, opened.frozen, examples)
    metrics = held_out_metrics(examples, scores, [2])
    nll, right, stops = [], [], []
    for i in range(len(examples)):
        ids, mask = examples[i]
        for t in range(1, len(ids)):
            if mask[t]:
                at = scores.starts[i] + t - 1
                nll.append(-scores.log_prob[at])
                right.append(scores.correct[at])
                if ids[t] == 2:
                    stops.append(math.exp(scores.log_prob[at]))
    num_answers = sum(m["role"] == "assistant" for row in conversations(40) for m in row["messages"])
    assert len(stops) == num_answers == 60
    assert metrics["num_targets"] == len(nll)
    np.testing.assert_allclose(metrics["loss"], np.mean(nll), rtol=1e-6)
    np.testing.assert_allclose(metrics["perplexity"], np.exp(np.mean(nll)), rtol=1e-6)
    np.testing.assert_allclose(metrics["token_accuracy"], np.mean(right))
    np.testing.assert_allclose(metrics["stop_probability"], np.mean(stops), rtol=1e-6)


@pytest.mark.smoke
def test_questions_end_where_the_last_answer_begins(encoded):
    rows, examples, tokenizer = encoded
    asked = questions(examples, rows, tokenizer)
    for row, question in zip(conversations(40), asked, strict=True):
        *before, last = row["messages"]
        expected = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert question.prompt_ids == expected
        assert question.question == before[-1]["content"]
        assert question.answer == last["content"]
    assert [q.question for q in questions(examples, rows, tokenizer, 3)] == [asked[i].question for i in (0, 20, 39)]


def _asked(tokenizer, rows, folder, longest=128, overlong="drop", keep_reasoning=True):
    sources = open_sources([SourceConfig(str(write_jsonl(folder / "rows.jsonl", [{"messages": row} for row in rows])))])
    encoder = Encoder(tokenizer, keep_reasoning=keep_reasoning)
    examples = encode_sources(sources, encoder, longest, overlong=overlong)[0]
    found = questions(examples, sources, tokenizer, keep_reasoning=keep_reasoning)
    return [(one.question, one.answer, tokenizer.decode(one.prompt_ids)) for one in found]


def test_the_answer_of_a_question_is_what_is_trained_after_its_prompt(tmp_path):
    tokenizer = make_tokenizer()
    first = [{"role": "user", "content": "river"}, {"role": "assistant", "content": "bridge"}]
    last = [{"role": "user", "content": "north"}, {"role": "assistant", "content": "market"}]
    prompts = ["<|im_start|>user\nriver<|im_end|>\n<|im_start|>assistant\n"]
    prompts.append(f"{prompts[0]}bridge<|im_end|>\n<|im_start|>user\nnorth<|im_end|>\n<|im_start|>assistant\n")
    both = _asked(tokenizer, [[*first, *last]], tmp_path)
    assert both == [("north", "market", prompts[1])]
    not_the_last = [*first, last[0], last[1] | {"train": False}]
    assert _asked(tokenizer, [not_the_last], tmp_path) == [("river", "bridge", prompts[0])]
    cut = [*first, last[0], last[1] | {"content": "market " * 40}]
    assert _asked(tokenizer, [cut, first], tmp_path, 60, "truncate") == [("river", "bridge", prompts[0])]
    thought = [first[0], first[1] | {"content": "<think>water</think>bridge"}]
    assert _asked(tokenizer, [thought], tmp_path, keep_reasoning=False) == [("river", "bridge", prompts[0])]
    assert _asked(tokenizer, [thought], tmp_path)[0][1] == "<think>water</think>bridge"


def test_the_question_of_a_conversation_whose_last_part_is_left_out(tmp_path):
    """The template takes the thoughts out of earlier turns, so that there are two parts; the last is too long."""
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = CHATML_UNMARKED.replace(
        "m['content'] + '<|im_end|>' }}",
        "(m['content'] if loop.last else m['content'].split('</think>')[-1]) + '<|im_end|>' }}",
    )
    row = [
        {"role": "user", "content": "river"},
        {"role": "assistant", "content": "<think>water</think>bridge"},
        {"role": "user", "content": "north"},
        {"role": "assistant", "content": "<think>" + "winter " * 60 + "</think>market"},
    ]
    ((question, answer, _),) = _asked(tokenizer, [row], tmp_path, 60)
    assert (question, answer) == ("river", "<think>water</think>bridge")


@pytest.mark.smoke
def test_pieces_put_characters_together(encoded):
    _, _, tokenizer = encoded
    text = "river élan 日本"
    ids = tokenizer(text)["input_ids"]
    shown = pieces(tokenizer, ids, [False] * len(ids))
    assert "".join(piece for piece, _ in shown) == text
    assert "\ufffd" not in "".join(piece for piece, _ in shown)
    mask = [i % 2 == 0 for i in range(len(ids))]
    assert {trained for _, trained in pieces(tokenizer, ids, mask)} == {True, False}


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
    """What a page refers to, and its text."""

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
    folder, _, last = evaluated
    report = folder / "run" / "report"
    summary = json.loads((report / "summary.json").read_text())
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
    assert "script" not in page.tags
    assert rows[0]["question"] in "".join(page.text)


def test_samples_while_training(evaluated):
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


def test_evaluate_again_gives_the_same(evaluated, tmp_path):
    folder, _, _ = evaluated
    report = folder / "run" / "report"
    before = json.loads((report / "summary.json").read_text())
    done = sft_jax("evaluate", folder / "config.yaml", "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    for name, metrics in again.items():
        for key, value in metrics.items():
            np.testing.assert_allclose(value, before[name][key], rtol=1e-4, atol=1e-7, err_msg=f"{name} {key}")
    table = sft_jax("evaluate", folder / "config.yaml", "evaluation.shots=0", "evaluation.num_questions=5")
    assert "5 held-out questions" in table.stdout
    assert "few" not in table.stdout
    for line in ("exact match", "stops by itself", "perplexity of documents", "KL to the base"):
        assert line in table.stdout


def test_full_and_added_tokens_compare_with_the_true_base(tiny, chats, evaluated, tmp_path):
    """The base beside a full run, and beside one with a grown token table, is the base model."""
    folder, config, _ = evaluated
    reference = json.loads((folder / "run" / "report" / "summary.json").read_text())["base"]
    for name, changes in {"full": {"lora": None}, "added": {"data__added_tokens": ["<|new|>"]}}.items():
        there = run_config(
            tiny,
            chats,
            tmp_path / name,
            data__eval=config.data.eval,
            training__max_steps=3,
            evaluation=dataclasses.replace(config.evaluation, samples=[], shots=0),
            **changes,
        )
        train(there, one_device())
        in_training = json.loads((tmp_path / name / "report" / "summary.json").read_text())
        afterwards = evaluate(there, devices=one_device()).summary
        for key, value in in_training["tuned"].items():
            np.testing.assert_allclose(afterwards["tuned"][key], value, rtol=1e-5, err_msg=f"{name} {key}")
        tolerance = 1e-5 if name == "full" else 0.05  # one more token takes a little probability from the others
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
    found = [json.loads(line) for line in done.stdout.splitlines()]
    expected = score(open_model(str(tiny), devices=one_device()), rows)
    for row, one in zip(found, expected, strict=True):
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
    evaluate = ["evaluate", folder / "config.yaml", "training.batch_size=8"]  # a row for each device of this process
    for arguments, words in (
        ([*evaluate, f"training.output_dir={tmp_path / 'gone'}"], "not a run folder"),
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
        said = capsys.readouterr().err
        assert words in said.splitlines()[-1], said
        assert "Traceback" not in said
    with pytest.raises(UserError, match=r"evaluation\.at_end: there is nothing to evaluate on"):
        run_config(tiny, chats, tmp_path / "run", evaluation=EvaluationConfig(at_end=True))
    with pytest.raises(UserError, match=r"evaluation\.samples_every: 0"):
        EvaluationConfig(samples_every=0)


def test_answer_metrics_are_shares():
    from sft_jax.evaluation.compare import Answered

    answers = [Answered("a", True, True, 4), Answered("b", False, True, 2)]
    assert answer_metrics(answers) == {"exact_match": 0.5, "stop_rate": 1.0, "mean_length": 3.0, "num_questions": 2}
