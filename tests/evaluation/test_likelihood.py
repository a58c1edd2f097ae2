"""Parts of an evaluation: answer comparison, log-likelihoods and divergence, metrics, and questions."""

import copy
import json
import math

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
    write_jsonl,
)

from sft_jax.assembly import open_model
from sft_jax.config import EvaluationConfig, SourceConfig
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.chat.pieces import pieces
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens.examples import encode_sources
from sft_jax.errors import UserError
from sft_jax.evaluation.answers import NORMALIZERS, same_answer
from sft_jax.evaluation.likelihood import Scorer
from sft_jax.evaluation.metrics import held_out_metrics
from sft_jax.evaluation.questions import last_run, questions
from sft_jax.hf.reader import TensorReader
from sft_jax.hf.tokenizer import load_tokenizer
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
def test_every_normalizer_can_be_configured():
    for kind in NORMALIZERS:
        assert EvaluationConfig(answer=kind).answer == kind
    with pytest.raises(UserError, match="exact, text, number, gsm8k, choice"):
        EvaluationConfig(answer="fuzzy")


def test_gsm8k_answers_are_extracted(data_dir):
    rows = [json.loads(line) for line in (data_dir / "gsm8k" / "test.jsonl").read_text().splitlines()]
    numbers = [NORMALIZERS["gsm8k"](row["answer"]) for row in rows]
    assert len(numbers) == 1319
    for row, number in zip(rows, numbers, strict=True):
        assert number is not None
        assert float(number) == float(row["answer"].split("####")[1].strip().replace(",", ""))


@pytest.mark.smoke
def test_worked_examples_of_the_docstrings():
    assert last_run(np.asarray([0, 1, 1, 0, 1, 1, 0], bool)) == (4, 6)
    assert last_run(np.asarray([1, 1], bool)) == (0, 2)


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
def test_scores_equal_a_dense_computation(tiny, encoded, devices):
    """Packed, chunked and sharded, against one example at a time with all logits."""
    _, examples, _ = encoded
    model, _, _ = load_model(tiny)
    opened = open_model(str(tiny), devices=jax.devices()[:devices])
    scorer = Scorer(opened.split, 128, 8)
    scores = scorer.score(opened.params, opened.frozen, examples)
    for i in range(0, len(examples), 5):
        ids, _ = examples[i]
        dense = log_softmax(logits(model, ids[None])[0, :-1].astype(np.float64))
        own = slice(scores.starts[i], scores.starts[i + 1])
        np.testing.assert_allclose(scores.log_prob[own], dense[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
        assert (scores.correct[own] == (dense.argmax(-1) == ids[1:])).all()


def test_divergence_equals_a_dense_computation(tmp_path, encoded):
    _, examples, _ = encoded
    folder = make_model(tmp_path / "model")
    model, split, params = load_model(folder)
    other = jax.tree.map(lambda x: x * 1.05, params)
    scorer = Scorer(split, 128, 4)
    total, count = 0.0, 0
    for i in range(len(examples)):
        ids = examples[i][0]
        padded = np.pad(ids, (0, 128 - len(ids)))[None]  # one length, so that it compiles once
        p, q = (
            log_softmax(logits(m, padded)[0, : len(ids) - 1].astype(np.float64))
            for m in (model, split.merge(other, {}))
        )
        total, count = total + (np.exp(p) * (p - q)).sum(), count + len(p)
    assert total / count > 1e-3
    np.testing.assert_allclose(scorer.divergence(params, other, {}, examples), total / count, rtol=1e-4)
    assert abs(scorer.divergence(params, params, {}, examples)) < 1e-6

    mesh = make_mesh(1, 2, 4, 1)
    sharded = build(model.arch, mesh, None, "float32")
    params, _ = load_weights(sharded, TensorReader(folder))
    other = jax.tree.map(lambda x: x * 1.05, params)
    divergence = Scorer(sharded, 128, 4).divergence(params, other, {}, examples)
    np.testing.assert_allclose(divergence, total / count, rtol=1e-4)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "ending", ["'<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "'<|im_end|>\n' }}{% endgeneration %}"]
)
def test_metrics_by_hand(tiny, encoded, ending):
    """Also with a template whose generation block, and so the loss mask, extends past the stop token."""
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
def test_prompts_end_where_the_last_answer_begins(encoded):
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
    result = questions(examples, sources, tokenizer, keep_reasoning=keep_reasoning)
    return [(one.question, one.answer, tokenizer.decode(one.prompt_ids)) for one in result]


def test_the_answer_of_a_question_is_the_supervised_text_after_its_prompt(tmp_path):
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


def test_the_question_of_a_conversation_whose_last_example_is_dropped(tmp_path):
    """The template removes reasoning from earlier turns, so that the row gives two examples; the last is too long."""
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
    assert {supervised for _, supervised in pieces(tokenizer, ids, mask)} == {True, False}
