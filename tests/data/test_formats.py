"""What rows of every format say, from every kind of file; what cannot be used is refused with its reason."""

import gzip
import json

import datasets
import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import CHATML, conversations, make_tokenizer, write_jsonl

from sft_jax.config.data import ROW_FORMATS, SourceConfig
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.formats import FORMATS, detect, parse
from sft_jax.data.read.rows import Conversation, Document, RowError, Tokens
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens.examples import encode_sources
from sft_jax.errors import UserError

pytestmark = pytest.mark.smoke


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text} | more


_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "row_format", "said"),
    [
        ({"messages": [user("a"), answer("b")]}, "messages", Conversation([user("a"), answer("b")], [None, None])),
        (
            {"messages": [user("a"), answer("b", train=False), answer("c", loss_weight=0.5)], "id": 3},
            "messages",
            Conversation([user("a"), answer("b"), answer("c")], [None, 0.0, 0.5], unread=frozenset({"id"})),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, answer("c")]},
            "messages",
            Conversation([user("ab"), answer("c")], [None, None]),
        ),
        (
            {
                "messages": [
                    user("a"),
                    {"role": "assistant", "content": None, "tool_calls": [{"function": _CALL["function"]}]},
                    {"role": "tool", "content": "2", "name": "f"},
                    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": 1, "y": null}'}]},
                ],
                "tools": json.dumps([{"name": "f", "parameters": {}}]),
            },
            "messages",
            Conversation(
                [
                    user("a"),
                    {"role": "assistant", "tool_calls": [_CALL]},
                    {"role": "tool", "content": "2", "name": "f"},
                    {"role": "assistant", "tool_calls": [_CALL]},
                ],
                [None] * 4,
                [_TOOL],
            ),
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
            "sharegpt",
            Conversation([{"role": "system", "content": "s"}, user("a"), answer("b")], [None] * 3),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1, "y": null}}'},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "b", "weight": 0},
                ],
                "tools": [_TOOL],
            },
            "sharegpt",
            Conversation(
                [
                    user("a"),
                    {"role": "assistant", "tool_calls": [_CALL]},
                    {"role": "tool", "content": "2"},
                    answer("b"),
                ],
                [None, None, None, 0.0],
                [_TOOL],
            ),
        ),
        (
            {"instruction": "Add.", "input": "", "output": "4"},
            "alpaca",
            Conversation([user("Add."), answer("4")], [None] * 2),
        ),
        (
            {"instruction": "Add.", "input": "2+2", "output": "4", "history": [["a", "b"]], "system": "s"},
            "alpaca",
            Conversation(
                [{"role": "system", "content": "s"}, user("a"), answer("b"), user("Add.\n2+2"), answer("4")],
                [None] * 5,
            ),
        ),
        ({"question": "q", "answer": "a"}, "question-answer", Conversation([user("q"), answer("a")], [None] * 2)),
        ({"query": "q", "response": "a"}, "question-answer", Conversation([user("q"), answer("a")], [None] * 2)),
        ({"prompt": "p", "completion": "c"}, "prompt-completion", Document("p", "c")),
        (
            {"prompt": [user("a"), answer("b"), user("c")], "completion": [answer("d")]},
            "prompt-completion",
            Conversation([user("a"), answer("b"), user("c"), answer("d")], [0.0, 0.0, 0.0, None]),
        ),
        ({"text": "t"}, "text", Document("", "t")),
        ({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, "tokens", Tokens([1, 2, 3], [0.0, 1.0, 1.0])),
        (
            {"input_ids": [1, 2, 3, 0], "assistant_masks": [0, 1, 1, 0], "attention_mask": [1, 1, 1, 0]},
            "tokens",
            Tokens([1, 2, 3], [0.0, 1.0, 1.0]),
        ),
    ],
)
def test_every_format(row, row_format, said):
    assert detect(row) == row_format
    assert parse(row_format, row) == said


def test_a_config_may_name_every_format():
    assert set(ROW_FORMATS) == {"auto", *FORMATS}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [user("a"), {"role": "assistant"}]}, "message 1: 'content' is missing"),
        ({"messages": [user(3), answer("b")]}, "message 0: 'content' must be a string, it is int '3'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image'"),
        ({"messages": [user("a"), answer("b", train="yes")]}, "'train' must be true, false or a number"),
        ({"messages": [user("a"), answer("b", weight=-1)]}, "must be between 0 and 10,000"),
        ({"messages": [user("a"), answer("b", weight=1, train=False)]}, "contradict each other"),
        ({"messages": [user("a"), answer("b", tool_calls=[{"arguments": {}}])]}, "no function name"),
        ({"messages": [user("a"), answer("b", tool_calls=[{"name": "f", "arguments": "{"}])]}, "not valid JSON"),
        ({"messages": [user("\ud800"), answer("b")]}, "lone surrogate"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "'from' 'narrator' is not one of user, human"),
        ({"instruction": "a", "output": None}, "'output' must be a string, it is null"),
        (
            {"input_ids": [1, 2], "labels": [2, -100]},
            "labels are shifted during training, so the data must not be shifted",
        ),
        ({"input_ids": [1, 2], "labels": [1]}, "has 2 tokens, but the labels or mask have 1"),
        ({"input_ids": [1, True], "labels": [1, 1]}, "must be a list of integers"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 0, 1]}, "with zeros only at the ends"),
    ],
)
def test_what_rows_are_refused_for(row, words):
    with pytest.raises(RowError) as raised:
        parse(detect(row), row)
    assert words in str(raised.value)


def opened(path, **options):
    (source,) = open_sources([SourceConfig(path=str(path), **options)])
    return source


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = conversations(30)
    expected = [parse("messages", row) for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\n  \n"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    with pa.output_stream(str(tmp_path / "c.jsonl.zst"), compression="zstd") as file:
        file.write(lines)
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "e.json").write_text(json.dumps({"version": 1, "data": rows}))
    (tmp_path / "f.json").write_bytes(lines)
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "g.parquet", batch_size=7)
    dataset.save_to_disk(tmp_path / "h")
    (arrow,) = (tmp_path / "h").glob("*.arrow")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/rows/i.jsonl", lines)
    places = [*sorted(tmp_path.glob("[a-g].*")), tmp_path / "h", arrow, "memory://rows/i.jsonl", "memory://rows"]
    assert len(places) == 11
    for place in places:
        source = opened(place)
        assert (len(source), source.format) == (30, "messages"), place
        assert list(source.read(0, 30)) == expected, place
        assert list(source.read(7, 12)) == expected[7:12], place
        assert source.row(29) == expected[29]


def test_csv_columns_and_limits(tmp_path):
    (tmp_path / "a.csv").write_text('problem,solution\n"What, now?",007\nNA,"two\nlines"\n')
    source = opened(tmp_path / "a.csv", columns={"question": "problem", "answer": "solution"})
    assert [row.last_exchange for row in source.read(0, 9)] == [("What, now?", "007"), ("NA", "two\nlines")]
    assert len(opened(tmp_path / "a.csv", columns={"question": "problem", "answer": "solution"}, max_rows=1)) == 1
    with pytest.raises(UserError, match="names the column 'problems', but this file has problem, solution"):
        opened(tmp_path / "a.csv", columns={"question": "problems"})
    with pytest.raises(UserError, match="'ask' is not a column of any format; the columns are messages"):
        opened(tmp_path / "a.csv", columns={"ask": "problem"})
    for name, line in (
        ("semicolons.csv", '"a, or b";2;3'),
        ("tabs.tsv", "a, or b\t2\t3"),
        ("commas.csv", '"a, or b",2,3'),
    ):
        delimiter = line[-2]
        (tmp_path / name).write_text(delimiter.join(("question", "answer", "note")) + f"\n{line}\n")
        assert opened(tmp_path / name).row(0).messages[0]["content"] == "a, or b"
    (tmp_path / "b.csv").write_text("text\na,b\n")
    with pytest.raises(UserError, match=r"b.csv:2: 2 values, 1 columns"):
        opened(tmp_path / "b.csv")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"{", "a.json:1: not valid JSON"),
        ("a.json", b"[1]", "a.json row 0: not a JSON object"),
        ("a.json", b"[" * 100_000, "a.json: not valid JSON"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"}\n", "a.jsonl:1: nested too deeply"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "a.jsonl:1: not valid JSON"),
        ("a.jsonl", b"\x00\x00\n", "a.jsonl:1: not valid JSON"),
        ("a.jsonl", b"[]\n", "a.jsonl:1: not a JSON object"),
        ("a.jsonl", b"\n\n  \n", "a.jsonl: has no rows"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: cannot be decompressed"),
        ("a.parquet", b"PAR1", "a.parquet: cannot be read as parquet"),
        ("a.arrow", b"ARROW1", "a.arrow: cannot be read as arrow"),
        ("a.csv", b'"text\n', "a.csv"),
        ("a.csv", b"text\n\xff\n", "a.csv: not valid UTF-8"),
        ("a.xml", b"<a/>", "unknown kind of file '.xml'"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        opened(tmp_path / name)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
_KEYS = ["role", "content", "from", "value", "tool_calls", "train", "weight", "thinking", "name", "arguments"]
_MESSAGES = st.lists(st.dictionaries(st.sampled_from(_KEYS), _JSON | st.sampled_from(["user", "assistant", "gpt"])))
_COLUMNS = ["messages", "conversations", "prompt", "completion", "text", "instruction", "input", "output", "tools"]
_COLUMNS += ["input_ids", "labels", "assistant_masks", "question", "answer", "history", "system", "attention_mask"]


@settings(deadline=None, max_examples=200)
@given(
    row=st.dictionaries(st.sampled_from(_COLUMNS), _JSON | _MESSAGES, max_size=6), row_format=st.sampled_from(FORMATS)
)
def test_rows_of_anything_are_read_or_refused(row, row_format):
    """Never another exception, neither while parsing nor while encoding."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    for name in {row_format, detect(row) or row_format}:
        try:
            said = parse(name, row)
        except RowError as error:
            said = error
        (found,) = Encoder(tokenizer).encode([said])
        assert isinstance(found, RowError) or all(len(one.ids) == len(one.mask) for one in found)


@settings(deadline=None, max_examples=100)
@given(
    content=st.binary(max_size=300)
    | st.lists(_JSON, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.json.zst"]),
)
def test_files_of_anything_are_read_or_refused(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(content)
    try:
        source = opened(path)
        examples, report = encode_sources([source], Encoder(make_tokenizer()), 64, on_bad_row="skip")
    except UserError as error:
        said = str(error)
    else:
        said = f"{report.total('kept')} rows"
        assert len(examples) == report.total("kept") > 0  # never silently empty
    assert said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template fails"),
        ("{{ 1 / 0 }}", "the chat template fails: division by zero"),
        ("{{ messages.__class__.__mro__ }}", "the chat template fails"),
        ("{% include '/etc/passwd' %}", "the chat template fails"),
        ("{{ messages[0].content.format_map }}", "another context before an answer"),
        ("{% if %}", "the chat template fails"),
        ("{{ raise_exception('no such role') }}", "the chat template fails: no such role"),
    ],
)
def test_templates_that_fail_or_pry(template, words):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    try:
        (found,) = Encoder(tokenizer).encode([Conversation([user("a"), answer("b")], [None, None])])
    finally:
        tokenizer.chat_template = CHATML
    assert isinstance(found, RowError)
    assert words in str(found)


def test_a_template_without_an_end(monkeypatch):
    monkeypatch.setattr("sft_jax.data.chat.template_limits.SECONDS", 0.3)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    try:
        with pytest.raises(UserError, match=r"does not finish within 0.3 seconds"):
            Encoder(tokenizer).encode([Conversation([user("a"), answer("b")], [None, None])])
    finally:
        tokenizer.chat_template = CHATML


def test_remote_places_that_are_not_there():
    with pytest.raises(UserError, match=r"^data: no files at memory://no/such.jsonl$"):
        opened("memory://no/such.jsonl")
    with pytest.raises(UserError, match=r"^data: nosuch://a.jsonl"):
        opened("nosuch://a.jsonl")


def test_malformed_lines_are_rows_that_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", conversations(3))
    path.write_bytes(path.read_bytes() + b'{"messages": [\n' + json.dumps(conversations(1)[0]).encode())
    sources = open_sources([SourceConfig(path=str(path))])
    with pytest.raises(UserError, match=r"a.jsonl:4: not valid JSON"):
        encode_sources(sources, Encoder(make_tokenizer()), 128)
    examples, report = encode_sources(sources, Encoder(make_tokenizer()), 128, on_bad_row="skip")
    assert examples.row.tolist() == [0, 1, 2, 4]
    assert report.total("refused") == 1
    assert list(report.dropped_by_reason.values()) == [1]
