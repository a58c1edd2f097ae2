"""Layouts of other tools and of the Hub: read where their meaning is certain, else told with the way out."""

import json

import pytest
from kit import conversations, write_jsonl

from sft_jax.config import SourceConfig
from sft_jax.data.read.formats import detect, parse
from sft_jax.data.read.rows import Document, RowError
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens.examples import Report, SourceReport
from sft_jax.data.tokens.tokenised import RowErrorAt
from sft_jax.errors import UserError

pytestmark = pytest.mark.smoke

USER, ANSWER = {"role": "user", "content": "river?"}, {"role": "assistant", "content": "bread"}
SAID = [USER, ANSWER]


def read(path, **options):
    return [row for source in open_sources([SourceConfig(path=str(path), **options)]) for row in source.read(0, 99)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "completion": "bread"},
        {"prompt": "river?", "completion": [ANSWER]},
        {"input": [USER], "output": "bread"},
        {"input": "river?", "output": "bread"},
        {"question": "river?", "response": "bread"},
        {"query": "river?", "answer": "bread"},
        {"instruction": "", "input": "river?", "output": "bread"},
        {"instruction": " \n", "input": "river?", "output": "bread"},
        {"instruction": "river?", "input": " ", "output": "bread"},
    ],
)
def test_one_side_as_messages_or_text(row):
    found = parse(detect(row), row)
    assert found.messages == SAID
    assert [weight for weight in found.weights if weight] == []
    assert found.weights[-1] is None


def test_plain_text_on_both_sides_is_no_chat():
    row = {"prompt": "river?", "completion": "bread"}
    assert parse(detect(row), row) == Document("river?", "bread")


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"conversation": SAID}, {"messages": "conversation"}),
        ({"dialogue": SAID, "topic": "rivers"}, {"messages": "dialogue"}),
        ({"problem": "river?", "solution": "bread", "level": 3}, {"question": "problem", "answer": "solution"}),
        ({"query": "river?", "answers": "bread"}, {"question": "query", "answer": "answers"}),
        ({"prompt": "river?", "response": "bread"}, {"question": "prompt", "answer": "response"}),
        ({"Instruction": "river?", "Response": "bread"}, {"question": "Instruction", "answer": "Response"}),
    ],
)
def test_other_names_of_columns_are_proposed_as_a_mapping(tmp_path, row, mapping):
    """And the proposal works as it is."""
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    said = ", ".join(f"{ours}: {theirs}" for ours, theirs in mapping.items())
    with pytest.raises(UserError, match=rf"set data\.\*\.columns: \{{{said}\}}"):
        read(path)
    (found,) = read(path, columns=mapping)
    assert found.messages == SAID


@pytest.mark.parametrize("parent", ["parent_id", "message_tree_id", "parent_message_id"])
@pytest.mark.parametrize("rest", [{"text": "river?", "role": "prompter"}, {"content": "river?"}])
def test_a_message_a_row(tmp_path, parent, rest):
    path = write_jsonl(tmp_path / "a.jsonl", [{"message_id": "a", parent: None} | rest])
    with pytest.raises(
        UserError, match=r"each row is a single message of a conversation tree .*join each path from a root"
    ):
        read(path)
    whole = write_jsonl(tmp_path / "b.jsonl", [{"messages": SAID, parent: "x"}])
    assert read(whole)[0].unread == {parent}


def test_null_is_told_as_null(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "a", "answer": None}, {"question": "a"}, {"messages": None}])
    found = [str(row) for row in read(path, format="question-answer")]
    assert found[0] == "'answer' must be a string, it is null"
    assert "'output' is missing" in found[1]
    with pytest.raises(RowError, match="message 0: 'content' is null"):
        parse("messages", {"messages": [{"role": "user", "content": None}]})


def test_numbers_in_reasons_are_theirs():
    """Only a message's number is no part of the reason."""
    reasons = ["message 1: token 7 of 9", "message 3: token 7 of 9", "message 3: token 8 of 9"]
    source = SourceReport("a", "messages", refused=3, reasons=[RowErrorAt(i, one) for i, one in enumerate(reasons)])
    assert Report([source]).dropped_by_reason == {"message 1: token 7 of 9": 2, "message 3: token 8 of 9": 1}


def file_names(sources):
    return sorted(source.name.rpartition("/")[2] for source in sources)


@pytest.mark.parametrize("in_data", [True, False])
@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"),
        ("train", "other", "validation"),
        ("chats_train", "more-train", "chats_test"),
    ],
)
def test_a_folder_as_the_hub_has_it(tmp_path, names, in_data):
    """Files of the split by their names, what is about the data is left alone, and what is not read is said."""
    folder = tmp_path / "data" if in_data else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    (tmp_path / "README.md").write_text("---\nconfigs: []\n---\n")
    for i, name in enumerate(names):
        write_jsonl(folder / f"{name}.jsonl", conversations(2, seed=i))
    of_train = open_sources([SourceConfig(path=str(tmp_path))])
    assert file_names(of_train) == sorted(f"{name}.jsonl" for name in names[:2])
    assert of_train[0].passed_over == (f"{names[2]}.jsonl",)
    split = "validation" if "validation" in names else "test"
    wanted = [name for name in names if split in name or name == "other"]
    found = open_sources([SourceConfig(path=str(tmp_path), split=split)])
    assert file_names(found) == sorted(f"{name}.jsonl" for name in wanted)
    if "other" not in names:
        with pytest.raises(UserError, match=r"no file of the split 'dev'; there are test, train \(set data\.\*\.split"):
            open_sources([SourceConfig(path=str(tmp_path), split="dev")])


def test_a_split_is_asked_for_where_all_files_are_of_it(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", conversations(1))
    (found,) = open_sources([SourceConfig(path=str(tmp_path), split="test")])
    assert (file_names([found]), found.passed_over) == (["test.jsonl"], ())


ROWS = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [{"text": "Zürich – fluß"}] * 3)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
@pytest.mark.parametrize(
    ("encoding", "told"), [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"), ("cp1252", "CP1252")]
)
def test_encodings_that_are_not_utf8_are_told_as_what_they_are(tmp_path, suffix, encoding, told):
    path = tmp_path / f"a.{suffix}"
    text = {"jsonl": ROWS, "json": f"[{ROWS.splitlines()[0]}]", "csv": "text\nZürich – fluß\n"}
    path.write_bytes(text[suffix].encode(encoding))
    with pytest.raises(UserError, match=rf"probably {told}; convert it with iconv -f {told} -t UTF-8"):
        open_sources([SourceConfig(path=str(path))])
    path.write_bytes(text[suffix].encode("utf-8-sig"))
    assert read(path)[0] == Document("", "Zürich – fluß")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_pointers_of_git_lfs(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 3\n")
    with pytest.raises(UserError, match=r"is a pointer of git-lfs .*git lfs pull"):
        read(tmp_path / f"a.{suffix}")
