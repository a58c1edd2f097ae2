"""Files, folders and globs; formats by name and by columns."""

import json

import datasets
import fsspec
import pytest
from kit import conversations, write_jsonl

from sft_jax.config import SourceConfig
from sft_jax.data.read import arrow_files
from sft_jax.data.read.arrow_process import open_rows, read
from sft_jax.data.read.sources import open_sources
from sft_jax.errors import UserError


def rows(path, **options):
    opened = open_sources([SourceConfig(path=str(path), **options)])
    return [(s.name, s.format, s.weight, list(s.table.read(0, len(s)))) for s in opened]


def test_jsonl_json_and_parquet_are_the_same(tmp_path):
    expected = conversations(4)
    write_jsonl(tmp_path / "a.jsonl", expected)
    (tmp_path / "b.json").write_text(json.dumps(expected))
    datasets.Dataset.from_list(expected).to_parquet(tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.json", "c.parquet"):
        assert rows(tmp_path / name) == [(str(tmp_path / name), "messages", 1.0, expected)]


def test_folder_and_glob_in_order_of_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write_jsonl(tmp_path / name, [{"text": name}])
    (tmp_path / "notes.md").write_text("not data")
    for place in (tmp_path, tmp_path / "*.jsonl"):
        found = rows(place, weight=2.0)
        assert [(name, data) for name, _, _, data in found] == [
            (str(tmp_path / n), [{"text": n}]) for n in ("a.jsonl", "b.jsonl")
        ]
        assert {weight for _, _, weight, _ in found} == {2.0}


def test_format_by_columns_and_by_name(tmp_path):
    both = write_jsonl(tmp_path / "both.jsonl", [{"prompt": "a", "completion": "b", "text": "ab"}])
    assert rows(both)[0][1] == "prompt-completion"
    assert rows(both, format="text")[0][1] == "text"
    with pytest.raises(UserError, match="format 'messages' needs the column 'messages', but this file has completion"):
        rows(both, format="messages")


def test_a_remote_file_is_fetched_once_a_version(monkeypatch):
    fs, fetched = fsspec.filesystem("memory"), []
    get_file = type(fs).get_file
    monkeypatch.setattr(type(fs), "get_file", lambda fs, path, to: (fetched.append(path), get_file(fs, path, to)))
    for text in ("first", "another"):
        fs.pipe_file("/data/a.jsonl", json.dumps({"text": text}).encode())
        for options in ({"max_rows": 1}, {}):
            assert rows("memory://data/*.jsonl", **options)[0][3] == [{"text": text}]
    assert fetched == ["/data/a.jsonl"] * 2


def test_a_column_that_some_rows_lack(tmp_path):
    lines = [{"q": "a", "a": "b"}, {"q": "c", "a": "d", "context": "e"}]
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    columns = {"instruction": "q", "output": "a", "input": "context"}
    (source,) = open_sources([SourceConfig(path=str(path), columns=columns)])
    assert source.format == "alpaca"
    assert [row.messages[0]["content"] for row in source.read(0, 2)] == ["a", "c\ne"]
    message = r"data\.\*\.columns names the column 'nothing', but this file has a, context, q"
    with pytest.raises(UserError, match=message):
        rows(path, columns=columns | {"input": "nothing"})


@pytest.mark.parametrize("options", [{"split": "test"}, {"revision": "main"}, {"name": "main"}])
def test_what_is_for_dataset_ids_is_refused_for_files(tmp_path, options):
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=rf"data\.\*\.{next(iter(options))}: .* is for Hugging Face dataset ids"):
        rows(path, **options)


def test_what_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.jsonl, \.json, \.csv"):
        rows(tmp_path / "empty")
    with pytest.raises(UserError, match=r"nothing\*\.jsonl' matches no file, folder or glob"):
        rows(tmp_path / "nothing*.jsonl")
    message = r"'some/dataset' \(name main, split train\) is not a local file and could not be"
    with pytest.raises(UserError, match=message):
        rows("some/dataset", name="main")


def test_a_configuration_of_a_dataset_on_the_hub(monkeypatch):
    """Against a stand-in of the one call that the reader makes, and of the reader."""
    asked = []

    def load_dataset(*given, **options):
        asked.append((given, options))
        return datasets.Dataset.from_list([{"question": "2+2?", "answer": "4"}])

    def ask(request):
        opened = open_rows(request["kind"], request["path"], request["options"])
        if request["what"] == "open":
            return {"rows": opened.num_rows, "columns": opened.columns, "digest": opened.digest}, b""
        return (lambda reply, stream: (json.loads(json.dumps(reply)), stream))(*read(opened, request["row"], 10))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(arrow_files._reader, "ask", ask)
    named = rows("openai/gsm8k", name="main", split="test")
    assert [(name, kind, len(data)) for name, kind, _, data in named] == [
        ("openai/gsm8k[main, test]", "question-answer", 1)
    ]
    assert rows("some/dataset")[0][0] == "some/dataset[train]"
    first = (("openai/gsm8k", "main"), {"split": "test", "revision": None})
    assert asked[0] == first
    assert asked[-1] == (("some/dataset", None), {"split": "train", "revision": None})
