"""What rows say beside their text: read, or listed as not read, or refused by name; nothing vanishes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import CHATML, CHATML_UNMARKED, make_tokenizer, write_jsonl

from sft_jax.config import SourceConfig
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.flags import FLAGS
from sft_jax.data.read.formats import FORMATS, detect, parse
from sft_jax.data.read.rows import Conversation, RowError
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens.examples import encode_sources

pytestmark = pytest.mark.smoke

TOOLS = "{% for tool in tools or [] %}{{ tool | tojson + '\n' }}{% endfor %}"
CALLS = (
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + (call.function.arguments | tojson) }}"
    "{% endfor %}"
)
WITH_TOOLS = TOOLS + CHATML_UNMARKED.replace(
    "m['content'] + '<|im_end|>' }}", f"m['content'] }}}}{CALLS}{{{{ '<|im_end|>' }}}}"
)
TIDE = {"name": "tide", "description": "Tells the tide.", "parameters": {"type": "object", "properties": {}}}


def user(text="river?", **more):
    return {"role": "user", "content": text, **more}


def answer(text="bread", **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture
def tokenizer(tokenizer):
    tokenizer.chat_template = WITH_TOOLS
    return tokenizer


def trained(tokenizer, row, ignored=()):
    """The whole text of a row, what of it is trained, and what of the row is not read."""
    encoder = Encoder(tokenizer)
    (result,) = encoder.encode([parse(detect(row), row, ignored=ignored)])
    if isinstance(result, RowError):
        raise result
    (one,) = result
    targets = [token for token, weight in zip(one.ids, one.mask, strict=True) if weight]
    return tokenizer.decode(one.ids), tokenizer.decode(targets), dict(encoder.tally.unread)


FIRST_NOT_TRAINED = [
    ("loss", False), ("loss", 0), ("train", False), ("training", False), ("trainable", False), ("weight", 0),
    ("loss_weight", 0.0), ("loss_mask", 0), ("masked", True), ("masked", 1),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), FIRST_NOT_TRAINED)
def test_flags_of_a_message(tokenizer, flag, value):
    row = {"messages": [user(), answer("winter", **{flag: value}), user(), answer("bread")]}
    assert trained(tokenizer, row)[1:] == ("bread<|im_end|>", {})


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_in_a_list_of_the_row(tokenizer, flag):
    one = 0 if flag == "masked" else 1
    messages = [user(), answer("winter"), user(), answer("bread")]
    row = {"messages": messages, flag: [1 - one] * 3 + [one]}
    assert trained(tokenizer, row)[1:] == ("bread<|im_end|>", {})
    with pytest.raises(RowError, match=f"column '{flag}' must be a list with a flag for each of the 4 messages"):
        parse("messages", row | {flag: [1, 0]})
    with pytest.raises(RowError, match="only assistant messages can be supervised"):
        trained(tokenizer, row | {flag: [one] * 4})
    with pytest.raises(RowError, match="contradict each other"):
        parse("messages", {"messages": [*messages[:3], answer("bread", train=False)], flag: row[flag]})


@pytest.mark.parametrize(
    ("name", "value"),
    [("mask", [0, 0, 1]), ("train_on_turn", True), ("assistant_masks", [0, 1]), ("no_loss", True), ("loss_scale", 0.5)],
)
def test_flags_in_words_that_are_not_known(name, value):
    for row in ({"messages": [user(), answer(**{name: value})]}, {"messages": [user(), answer()], name: value}):
        with pytest.raises(RowError, match=rf"{name!r} is not supported, .*data\.\*\.ignore_columns: \[{name}\]"):
            parse("messages", row)
        told = {f"messages[].{name}, by ignore_columns", f"{name}, by ignore_columns"}
        assert len(parse("messages", row, ignored=[name]).unread & told) == 1
    text = {"messages": [user(), answer()], name: "a name, and no number"}
    assert parse("messages", text).unread == {name}


SYSTEM = {
    "messages": {"messages": [user(), answer()]},
    "sharegpt": {"conversations": [{"from": "human", "value": "river?"}, {"from": "gpt", "value": "bread"}]},
    "alpaca": {"instruction": "river?", "output": "bread"},
    "question-answer": {"question": "river?", "response": "bread"},
    "prompt-completion": {"prompt": [user()], "completion": [answer()]},
}


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("row_format", SYSTEM)
def test_system_prompts_and_tools_of_every_chat_format(tokenizer, row_format, column):
    row = SYSTEM[row_format] | {column: "harbour", "tools": json.dumps([TIDE])}
    text, targets, unread = trained(tokenizer, row)
    assert text.startswith(
        f"{json.dumps({'type': 'function', 'function': TIDE})}\n<|im_start|>system\nharbour<|im_end|>"
    )
    assert (targets, unread) == ("bread<|im_end|>", {})
    old = SYSTEM[row_format] | {column: "harbour", "functions": [TIDE]}
    assert trained(tokenizer, old) == (text, targets, {})
    with pytest.raises(RowError, match="'tools' and 'functions' both have schemas"):
        parse(row_format, row | old)
    with pytest.raises(RowError, match="have different system prompts"):
        parse(row_format, row | {"system": "market", "system_prompt": "harbour"})


def test_a_system_prompt_that_the_messages_have_too(tokenizer):
    messages = [{"role": "system", "content": "harbour"}, user(), answer()]
    assert trained(tokenizer, {"messages": messages, "system": "harbour "})[0].count("harbour") == 1
    with pytest.raises(RowError, match="'system' and the messages have different system prompts"):
        parse("messages", {"messages": messages, "system": "market"})


@pytest.mark.parametrize("name", ["image", "videos", "tools", "system"])
def test_what_plain_text_has_no_place_for(name):
    with pytest.raises(RowError, match=rf"has '{name}'; .*ignore_columns: \[{name}\]"):
        parse("text", {"text": "a river", name: ["something"]})
    assert parse("text", {"text": "a river", name: None}).unread == frozenset()


def test_keys_that_the_template_does_not_write(tokenizer):
    call = {"id": "c1", "type": "function", "index": 0, "function": {"name": "tide", "arguments": {}, "strict": True}}
    parts = [{"type": "text", "text": "river?", "cache_control": 1}]
    row = {
        "messages": [user(parts, name="ada"), answer("", tool_calls=[call]), {"role": "tool", "content": "6"}, answer()]
    }
    row["tools"] = [TIDE]
    assert trained(tokenizer, row)[2] == {
        "messages[].name": 1,
        "messages[].content[].cache_control": 1,
        "messages[].tool_calls[].index": 1,
        "messages[].tool_calls[].function.strict": 1,
        "messages[].tool_calls[].id": 1,
    }
    tokenizer.chat_template = WITH_TOOLS.replace("m['role'] +", "m['role'] + (m.name or '') +")
    assert "messages[].name" not in trained(tokenizer, row)[2]


def test_arguments_of_the_template_by_row(tokenizer):
    tokenizer.chat_template = WITH_TOOLS.replace("assistant\n' }}", "assistant\n' + (mood or '') }}") + "{# mood #}"
    row = {"messages": [user(), answer()], "chat_template_kwargs": {"mood": "", "colour": "blue"}}
    assert trained(tokenizer, row)[2] == {"chat_template_kwargs.colour": 1}
    with pytest.raises(RowError, match="'tools' is set by the renderer"):
        trained(tokenizer, row | {"chat_template_kwargs": {"tools": []}})
    with pytest.raises(RowError, match="'chat_template_kwargs' must be an object"):
        parse("messages", row | {"chat_template_kwargs": "[1]"})


NAMES = st.from_regex(r"[a-z]{1,3}(_[a-z]{1,6})?", fullmatch=True)
VALUES = st.one_of(
    st.integers(), st.floats(allow_nan=False), st.booleans(), st.text("abc xyz", min_size=1), st.lists(st.integers()),
    st.dictionaries(NAMES, st.text("abc")),
)  # fmt: skip


ROW = st.dictionaries(NAMES, VALUES, max_size=1)


@settings(max_examples=200, deadline=None)
@given(row_format=st.sampled_from(sorted(SYSTEM)), of_row=ROW, of_message=ROW)
def test_no_column_and_no_key_vanishes(row_format, of_row, of_message):
    """Each is read by the format, or changes the text, or is listed, or the row is refused."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = WITH_TOOLS
    row = json.loads(json.dumps(SYSTEM[row_format]))
    plain = trained(tokenizer, row)
    holders = [message for value in row.values() if isinstance(value, list) for message in value]
    for holder in holders[-1:]:
        holder.update({name: value for name, value in of_message.items() if name not in holder})
    row |= {name: value for name, value in of_row.items() if name not in row}
    if detect(row) != row_format:
        return  # by its columns it is of another format
    try:
        found = trained(tokenizer, row)
    except RowError:
        return
    finally:
        tokenizer.chat_template = CHATML
    told = {name for name in of_row if name not in SYSTEM[row_format]}
    told |= {f"messages[].{name}" for name in of_message if holders}
    vanished = told - found[2].keys()
    assert not vanished or found[:2] != plain[:2], vanished


def test_the_start_and_inspect_say_it(tmp_path, tokenizer):
    rows = [{"messages": [user(), answer()], "id": i} for i in range(3)]
    del rows[1]["id"]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    _, report = encode_sources(open_sources([SourceConfig(path=str(path))]), Encoder(tokenizer), 128)
    assert report.not_read == [f"{path}: id (2 rows)"]
    source = SourceConfig(path=str(path), ignore_columns=["id"])
    _, report = encode_sources(open_sources([source]), Encoder(tokenizer), 128)
    assert report.not_read == [f"{path}: id, by ignore_columns (2 rows)"]


def test_every_format_says_what_it_leaves():
    rows = SYSTEM | {"text": {"text": "river"}, "tokens": {"input_ids": [1, 2], "labels": [1, 2]}}
    assert rows.keys() == set(FORMATS)
    for row_format, row in rows.items():
        assert parse(row_format, row | {"lang": "en"}).unread == {"lang"}
    assert isinstance(parse("messages", rows["messages"]), Conversation)
