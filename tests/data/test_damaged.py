"""Damaged, endless and huge data files: each is refused by its name, and what is right in it is read."""

import gzip
import json
import os
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import conversations, write_jsonl

from sft_jax.config import SourceConfig
from sft_jax.data.read import arrow_files, text_files
from sft_jax.data.read.rows import RowError
from sft_jax.data.read.sources import open_sources
from sft_jax.data.read.tables import open_file
from sft_jax.errors import UserError


def rows(path):
    table = open_file(path, path.name)
    return list(table.read(0, len(table)))


def text_rows(num):
    return [{"text": f"tea {n}"} for n in range(num)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.jsonl.gz"])
def test_a_fifo_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: is a FIFO, a device or a socket, not a file"):
        open_file(tmp_path / name, name)
    with pytest.raises(UserError, match=r"matches no file|is a FIFO"):
        open_sources([SourceConfig(path=str(tmp_path / name))])
    with pytest.raises(UserError, match="is a FIFO"):
        open_sources([SourceConfig(path=str(tmp_path))])


def test_devices_and_folders(tmp_path):
    (tmp_path / "a.json").symlink_to("/dev/zero")
    (tmp_path / "b.jsonl").mkdir()
    for name, kind in (("a.json", "a device"), ("b.jsonl", "is a folder")):
        with pytest.raises(UserError, match=kind):
            open_file(tmp_path / name, name)
    with pytest.raises(UserError, match="File name too long"):
        open_sources([SourceConfig(path="a" * 5000 + ".jsonl")])
    with pytest.raises(UserError, match=r"data\.\*\.path: 'a\\x00b' is not the name of a file"):
        open_sources([SourceConfig(path="a\0b")])


def test_a_file_that_changes_or_vanishes_while_it_is_read(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", text_rows(3))
    table = open_file(path, "a.jsonl")
    path.write_text('{"text": "milk"}\n' * 3)
    with pytest.raises(UserError, match=r"a\.jsonl: was changed while it was read"):
        list(table.read(0, 3))
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read: .* No such file"):
        list(table.read(0, 3))


def test_a_huge_row_is_refused_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "ROW_BYTES", 100)
    monkeypatch.setattr(text_files, "_CHUNK", 64)
    lines = [{"text": "a"}, {"text": "b" * 200}, *text_rows(20)]
    first, huge, *others = rows(write_jsonl(tmp_path / "a.jsonl", lines))
    assert (first, others) == (lines[0], lines[2:])
    assert huge.at("a.jsonl", 1) == "a.jsonl:2: the row has more than 0 MB"
    (tmp_path / "a.json").write_text(json.dumps(lines))
    with pytest.raises(UserError, match=r"a\.json row 1: the row has more than 0 MB"):
        rows(tmp_path / "a.json")
    (tmp_path / "a.csv").write_text("text\n" + "b" * 200 + "\n")
    with pytest.raises(UserError, match=r"a\.csv:2: not valid CSV: field larger than field limit"):
        rows(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "a.json:1: not valid JSON: Expecting value"),
        ('[{"a": 1}', "a.json:1: not valid JSON: Expecting ',' delimiter"),
        ('[{"a": 1} {"a": 2}]', "not valid JSON: Expecting ',' delimiter"),
        ('[\n{"a": 1},\n]', "a.json:3: not valid JSON: Expecting value"),
        ('[{"a": 1}] more', "not valid JSON: Extra data"),
        ('[{"a": 1}, 7]', "a.json row 1: not a JSON object"),
        ("[[" * 100_000, "a.json: not valid JSON: maximum recursion depth"),
        ("7", "must contain a list of objects, it contains a int"),
    ],
)
def test_lists_in_json(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as raised:
        rows(tmp_path / "a.json")
    assert message in str(raised.value)


@pytest.mark.parametrize("text", ['\ufeff [\n\t{"a": [1, "]"]} ,\r\n {"a": {}}\n]\n', '[{"a":[1,"]"]},{"a":{}}]'])
def test_rows_of_a_list_in_json(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert rows(tmp_path / "a.json") == [{"a": [1, "]"]}, {"a": {}}]


def test_compressed_files_that_expand_too_far(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "EXPANSION_BYTES", 1 << 20)
    monkeypatch.setattr(text_files, "_CHUNK", 1 << 16)
    line = b'{"text": "tea"}\n'
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(line * 200_000))
    with pytest.raises(UserError, match=r"bomb.jsonl.gz: expands to more than 1 MB, 100 times its size"):
        rows(tmp_path / "bomb.jsonl.gz")
    (tmp_path / "good.jsonl.gz").write_bytes(gzip.compress(line * 20_000))
    assert len(rows(tmp_path / "good.jsonl.gz")) == 20_000


def write(path, table):
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_crash_of_the_reader_is_one_line(tmp_path, suffix):
    """The reader is killed by the signal of a bad address; the next file has a new one."""
    path = write(tmp_path / f"a{suffix}", pa.table({"text": ["tea"] * 3000}))
    table = open_file(path, path.name)
    assert len(list(table.read(0, 10))) == 10
    reader = arrow_files._reader._process
    os.kill(reader.pid, signal.SIGSEGV)
    reader.wait()
    with pytest.raises(
        UserError, match=r"a\.\w+: cannot be read as \w+: its reader crashed \(signal 11\); the file is"
    ):
        list(table.read(10, 20))
    assert rows(path) == [{"text": "tea"}] * 3000


def test_rows_of_arrow_that_are_invalid_are_refused_alone(tmp_path):
    path = write(tmp_path / "a.arrow", pa.table({"text": [f"tea {n}" for n in range(3000)]}))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"tea 1234", b"t\xff\xfe 1234"))
    found = rows(path)
    assert [i for i, row in enumerate(found) if isinstance(row, RowError)] == [1234]
    assert "Invalid UTF8" in str(found[1234])
    assert (found[0], found[2999]) == ({"text": "tea 0"}, {"text": "tea 2999"})


def test_dictionaries_with_indices_out_of_range(tmp_path):
    bad = pa.DictionaryArray.from_arrays(pa.array([0, 9], pa.int8()), pa.array(["tea"]), safe=False)
    path = write(tmp_path / "a.arrow", pa.table({"text": bad}))
    with pytest.raises(UserError, match=r"a\.arrow: cannot be read as arrow: .*out of bounds: 9"):
        rows(path)
    good = pa.array(["tea", "milk", "tea"] * 1000).dictionary_encode()
    assert rows(write(tmp_path / "b.arrow", pa.table({"text": good})))[:2] == [{"text": "tea"}, {"text": "milk"}]


def test_more_rows_than_bytes(tmp_path):
    nulls = pa.Array.from_buffers(pa.null(), 1 << 40, [None])
    path = tmp_path / "a.arrow"
    options = pa.ipc.IpcWriteOptions(allow_64bit=True)
    table = pa.table({"text": nulls})
    with pa.ipc.new_file(str(path), table.schema, options=options) as file:
        file.write_table(table)
    with pytest.raises(UserError, match=r"it says that it has 1,099,511,627,776 rows, but has only [\d,]+ bytes"):
        open_file(path, path.name)


def test_a_row_of_too_many_values(tmp_path):
    """A row of 200 million equal numbers is a few hundred bytes."""
    path = tmp_path / "a.arrow"
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([200_000_000], pa.int64()), pa.array([7], pa.int64()))
    row = pa.ListArray.from_arrays(pa.array([0, len(runs)], pa.int32()), runs)
    with pa.ipc.new_file(str(path), pa.schema([("input_ids", row.type)])) as file:
        file.write_table(pa.table({"input_ids": row}))
    (found,) = rows(path)
    assert isinstance(found, RowError)
    assert "has more than 32 MB, or 8,388,608 values" in str(found)


def test_dates_that_python_does_not_have(tmp_path):
    table = pa.table({"text": ["a", "b"], "at": pa.array([1 << 60, 0], pa.timestamp("s"))})
    bad, good = rows(write(tmp_path / "a.arrow", table))
    assert isinstance(bad, RowError)
    assert good["text"] == "b"


def test_rows_are_read_in_any_order(tmp_path):
    """Also backwards, over row groups, and one by one."""
    lines = [{"text": f"tea {n}"} for n in range(5000)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(lines), path, row_group_size=1700)
    table = open_file(path, "a")
    assert list(table.read(0, 5000)) == lines
    for start, stop in ((4000, 4100), (100, 3600), (0, 1), (4999, 6000), (1699, 1701), (1000, 2000), (2000, 3000)):
        assert list(table.read(start, stop)) == lines[start:stop]
    saved = conversations(3)
    write_jsonl(tmp_path / "b.jsonl", saved)
    assert rows(tmp_path / "b.jsonl") == saved


def test_after_an_interruption_no_reply_is_mistaken_for_another(tmp_path, monkeypatch):
    """Ctrl-C may come after a request was sent and before its reply was read."""
    pq.write_table(pa.table({"text": ["tea"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["milk", "bread"]}), tmp_path / "b.parquet")
    first = open_file(tmp_path / "a.parquet", "a")

    def interrupted(reader):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(arrow_files._Reader, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(first.read(0, 1))
    assert rows(tmp_path / "b.parquet") == [{"text": "milk"}, {"text": "bread"}]
    assert list(first.read(0, 1)) == [{"text": "tea"}]


def test_names_inside_of_columns_that_are_not_text(tmp_path):
    path = write(tmp_path / "a.arrow", pa.table({"messages": [[{"rollen": "user"}]]}))
    path.write_bytes(path.read_bytes().replace(b"rollen", b"roll\xff\xfe"))
    with pytest.raises(UserError, match=r"a\.arrow: cannot be read as arrow: 'utf-8' codec"):
        open_file(path, "a.arrow")
