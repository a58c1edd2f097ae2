"""Several accepted answers: read from held-out rows, refused in training data."""

import json

import pytest
from kit import make_tokenizer, sft_jax, write_jsonl

from sft_jax.config import DataConfig, SourceConfig
from sft_jax.data.read.formats import parse
from sft_jax.data.read.rows import RowError
from sft_jax.data.tokens.prepare import prepare_data
from sft_jax.errors import UserError
from sft_jax.evaluation.questions import questions

pytestmark = pytest.mark.smoke
LAST = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    ("row_format", "row"),
    [
        ("question-answer", {"question": "2+2?", "answer": ["4", "four", "IV"]}),
        ("question-answer", {"question": "2+2?", "answer": "4", "answers": ["four", "IV"]}),
        ("question-answer", {"query": "2+2?", "response": ["4", "four"], "answers": ["IV"]}),
        ("question-answer", {"input": "2+2?", "output": ["4", "four", "IV"]}),
        ("alpaca", {"instruction": "2+2?", "output": ["4", "four", "IV"]}),
        ("prompt-completion", {"prompt": "2+2?", "completion": ["4", "four", "IV"]}),
        ("prompt-completion", {"prompt": LAST[:1], "completion": ["4", "four", "IV"]}),
        ("messages", {"messages": LAST, "answers": ["four", "IV"]}),
        ("messages", {"messages": LAST, "answers": '["four", "IV"]'}),
        ("question-answer", {"question": "2+2?", "answer": "4", "answers": ["four", "IV"], "id": 3}),
    ],
)
def test_forms(row_format, row):
    parsed = parse(row_format, row, is_held_out=True)
    assert parsed.accepted == ("four", "IV")
    assert parsed.last_exchange == ("2+2?", "4")
    assert parsed.unread == ({"id"} if "id" in row else set())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "a", "answer": "b", "answers": {"text": ["c"]}}, "'answers' must be a list of texts that count"),
        ({"question": "a", "answer": "b", "answers": ["c", 4]}, r"ignore_columns: \[answers\]"),
        ({"question": "a", "answer": "b", "answers": "c"}, "'answers' is not valid JSON"),
        ({"question": "a", "answer": ["b", "\ud800"]}, "'answer' has a lone surrogate"),
        ({"messages": [*LAST, LAST[0]], "answers": ["c"]}, "its last message is no answer that carries loss"),
        ({"messages": [LAST[0], {**LAST[1], "train": False}], "answers": ["c"]}, "no answer that carries loss"),
    ],
)
def test_bad_rows(row, words):
    with pytest.raises(RowError, match=words):
        parse("messages" if "messages" in row else "question-answer", row, is_held_out=True)


def test_ignored_answers():
    row = {"question": "a", "answer": "b", "answers": {"text": ["c"]}}
    assert parse("question-answer", row, ignored=["answers"], is_held_out=True).accepted == ()


def test_training_data(tmp_path):
    """A list of answers is refused; the column ``answers`` is not read, and listed."""
    with pytest.raises(RowError, match="only held-out data may have several accepted answers; keep one"):
        parse("question-answer", {"question": "a", "answer": ["b", "c"]})
    parsed = parse("question-answer", {"question": "a", "answer": "b", "answers": ["c"]})
    assert (parsed.accepted, parsed.unread) == ((), {"answers"})
    config = DataConfig(train=[SourceConfig("-")], max_length=64, cache=False)
    file = write_jsonl(tmp_path / "rows.jsonl", [{"question": "a", "answer": ["b", "c"]}])
    with pytest.raises(UserError, match=r"rows\.jsonl row 0: 'answer' is a list of texts"):
        prepare_data(config, [SourceConfig(str(file))], make_tokenizer(), (), 512)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_they_reach_the_questions(tmp_path, num_workers):
    """Also through worker processes, and apart from the cache of the same file as training data."""
    rows = [{"question": "Which river?", "answer": "seven", "answers": ["north"]}, {"question": "a", "answer": ["b"]}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig(train=[SourceConfig("-")], max_length=64, num_workers=num_workers)
    tokenizer = make_tokenizer()
    held_out = prepare_data(config, [SourceConfig(str(file))], tokenizer, (2,), 512, is_held_out=True)
    assert held_out.report.not_read == []
    asked = questions(held_out.examples, held_out.sources, tokenizer)
    assert [one.accepted for one in asked] == [("seven", "north"), ("b",)]
    assert asked[1].where == f"{file} row 1"
    with pytest.raises(UserError, match="row 1: 'answer' is a list"):
        prepare_data(config, [SourceConfig(str(file))], tokenizer, (2,), 512)


def test_inspect_reads_them_in_held_out_data(tiny, tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [{"question": "a", "answer": "b"}])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [{"question": "a", "answer": ["b", "c"]}])
    data = [f"model.path={tiny}", "data.max_length=64", f"training.output_dir={tmp_path / 'run'}"]
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"data": {"train": [{"path": str(train)}], "eval": [{"path": str(held_out)}]}}))
    done = sft_jax("inspect", config, *data, "--rows", "0")
    assert done.returncode == 0, done.stderr
    assert "1 of 1 rows" in done.stderr
    swapped = sft_jax("inspect", config, *data, "--rows", "0", f"data.train.0.path={held_out}")
    assert swapped.returncode == 2
    assert "held_out.jsonl row 0: 'answer' is a list of texts" in swapped.stderr.splitlines()[-1]
