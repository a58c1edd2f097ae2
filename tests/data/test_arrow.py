"""Arrow types that mean something: JSON, maps, bytes, nulls; in Parquet, in Arrow and in saved data sets."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import conversations

from sft_jax.config import SourceConfig
from sft_jax.data.read.rows import RowError
from sft_jax.data.read.sources import open_sources

CALL = {"type": "function", "function": {"name": "cook", "arguments": {"dish": "soup", "salt": None}}}
MESSAGES = [
    {"role": "user", "content": "Make soup."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "ok"},
    {"role": "assistant", "content": "Done."},
]
TOOL = {"type": "function", "function": {"name": "cook", "parameters": {"salt": {"default": None}}}}
ROW = {"messages": MESSAGES, "tools": [TOOL]}


def write(table, path):
    """A table as one of the kinds of files."""
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    else:
        datasets.Dataset(table).save_to_disk(str(path))
    return path


def as_json(values):
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(map(json.dumps, values), pa.string()))


def read(path):
    (source,) = open_sources([SourceConfig(path=str(path))])
    return source, list(source.read(0, len(source)))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("form", ["whole", "in lists", "in a struct"])
def test_json_extension_values_are_what_they_say(tmp_path, suffix, form):
    """With the nulls that they hold, which are theirs, and not of other rows' keys."""
    if form == "whole":
        columns = {name: as_json([value]) for name, value in ROW.items()}
    else:
        columns = {name: pa.ListArray.from_arrays([0, len(value)], as_json(value)) for name, value in ROW.items()}
    if form == "in a struct":
        arguments = as_json([CALL["function"]["arguments"]])
        function = pa.StructArray.from_arrays([pa.array(["cook"]), arguments], ["name", "arguments"])
        calls = pa.StructArray.from_arrays([pa.array(["function"]), function], ["type", "function"])
        of_all = pa.ListArray.from_arrays([0, 0, 1, 1, 1], calls)
        texts = [pa.array([message[key] for message in MESSAGES]) for key in ("role", "content")]
        messages = pa.StructArray.from_arrays([*texts, of_all], ["role", "content", "tool_calls"])
        columns["messages"] = pa.ListArray.from_arrays([0, len(MESSAGES)], messages)
    table = pa.table(columns)
    _, (found,) = read(write(table, tmp_path / f"a{suffix}"))
    assert found.messages == MESSAGES
    assert found.tools == [TOOL]


def test_json_features_of_datasets(tmp_path):
    features = datasets.Features({"messages": datasets.List(datasets.Json()), "tools": datasets.List(datasets.Json())})
    dataset = datasets.Dataset.from_list([ROW], features=features)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        _, (found,) = read(tmp_path / name)
        assert (found.messages, found.tools) == (MESSAGES, [TOOL])


def test_json_that_is_none_refuses_its_row_alone(tmp_path):
    storage = pa.array(["[", json.dumps(MESSAGES)], pa.string())
    table = pa.table({"messages": pa.ExtensionArray.from_storage(pa.json_(), storage)})
    _, (bad, good) = read(write(table, tmp_path / "a.parquet"))
    assert isinstance(bad, RowError)
    assert "column 'messages' cannot be read" in str(bad)
    assert good.messages == MESSAGES


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_maps_are_objects(tmp_path, suffix):
    of_text = pa.map_(pa.string(), pa.string())
    chat = [[[("role", "user"), ("content", "Tea?")], [("role", "assistant"), ("content", "Yes.")]]]
    _, (found,) = read(write(pa.table({"messages": pa.array(chat, pa.list_(of_text))}), tmp_path / f"a{suffix}"))
    assert found.messages == [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]
    call = pa.struct([("name", pa.string()), ("arguments", of_text)])
    kind = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))])
    calls = [{"name": "tide", "arguments": [("at", "Brest"), ("on", None)]}]
    rows = [[{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": "", "tool_calls": calls}]]
    _, (found,) = read(write(pa.table({"messages": pa.array(rows, pa.list_(kind))}), tmp_path / f"b{suffix}"))
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"at": "Brest", "on": None}


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.string_view(), pa.large_string(), pa.binary(4)])
def test_text_of_other_types(tmp_path, kind):
    """Bytes are the text of writers that have no type for it; bytes that are no text refuse their row."""
    texts = [b"Tea?", b"Yes."] if pa.types.is_binary(kind) or "binary" in str(kind) else ["Tea?", "Yes."]
    table = pa.table({"question": pa.array(texts[:1], kind), "answer": pa.array(texts[1:], kind)})
    _, (found,) = read(write(table, tmp_path / "a.parquet"))
    assert [message["content"] for message in found.messages] == ["Tea?", "Yes."]
    if isinstance(texts[0], bytes):
        table = pa.table({"question": pa.array([b"\xff\xfe\xff\xfe"], kind), "answer": pa.array(texts[1:], kind)})
        _, (found,) = read(write(table, tmp_path / "b.parquet"))
        assert "column 'question' cannot be read" in str(found)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ""])
@pytest.mark.parametrize("nulls", [1, 120])
def test_nulls_in_the_first_rows(tmp_path, suffix, nulls):
    """The schema has the column; the format is told by the first rows that have values."""
    values = [None] * nulls + [row["messages"] for row in conversations(2)]
    source, rows = read(write(pa.table({"messages": values}), tmp_path / f"a{suffix}"))
    assert source.format == "messages"
    assert [str(row) for row in rows[:nulls]] == ["'messages' must be a list of messages, it is null"] * nulls
    assert [row.messages for row in rows[nulls:]] == values[nulls:]
    beside = pa.table({"text": pa.array([None] * len(values), pa.string()), "messages": values})
    assert read(write(beside, tmp_path / f"b{suffix}"))[0].format == "messages"


def test_the_format_is_that_of_the_columns_with_values(tmp_path):
    """A column of another format that is null in every row that is looked at tells nothing."""
    nothing = pa.array([None] * 3, pa.list_(pa.string()))
    table = pa.table({"messages": nothing, "question": ["a"] * 3, "answer": ["b"] * 3})
    source, rows = read(write(table, tmp_path / "a.parquet"))
    assert source.format == "question-answer"
    assert len(rows[0].messages) == 2
