"""Real templates with real tokenizers: ids and masks are transformers' own, marked and unmarked variants agree."""

import json
import re
from pathlib import Path

import pytest
from kit import CHATML, ROOT, conversations
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sft_jax.data.chat.encoder import STRADDLING, Encoder
from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.read.formats import parse
from sft_jax.data.read.rows import RowError

TEMPLATES = ("qwen2_5", "qwen3", "llama3", "gemma", "phi3")
TOKENIZERS = ("qwen2", "olmo_gpt_neox")
# What each template writes and a tokenizer of another family does not have.
TOKENS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
TOKENS += ["<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<bos>"]

_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def test_the_chatml_that_comes_along_is_that_of_the_tests():
    path = ROOT / "configs" / "chatml.jinja"
    for row in conversations(6):
        for prompt in (False, True):
            ours, theirs = (
                ChatTemplate(text).render(row["messages"], prompt=prompt)
                for text in (path.read_text(encoding="utf-8"), CHATML)
            )
            assert ours == theirs


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text} | more


_CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CONVERSATIONS = {
    "single turn": {"messages": [user("What is 2 + 2?"), answer("4")]},
    "multi-turn": {
        "messages": [user("Hi"), answer("Hello there."), user("And?"), answer("Nothing."), user("Bye"), answer("Bye!")]
    },
    "system": {"messages": [{"role": "system", "content": "Be brief."}, user("Who are you?"), answer("A model.")]},
    "tool call": {
        "messages": [
            user("How is the weather?"),
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "content": '{"degrees": 21}'},
            answer("It is 21 degrees."),
        ],
        "tools": _TOOLS,
    },
    "empty content": {"messages": [user("Say nothing."), answer("")]},
    "empty question": {"messages": [user(""), answer("You said nothing.")]},
    "unicode": {"messages": [user("Ça va ? 你好 👩‍👩‍👧 ﷽"), answer("Très bien 🎉 — “ça” 漢字 \u200d\u0301 עברית")]},
    "blanks": {"messages": [user("  two\n\n"), answer("Line one\n\n  indented\n\nlast")]},
    "same words": {"messages": [user("yes"), answer("yes"), user("yes yes"), answer("yes")]},
    "code": {"messages": [user("Code?"), answer("```python\nfor i in range(3):\n\tprint(f'{i}')\n```")]},
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request, data_dir):
    folder = data_dir / "tokenizers" / request.param
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    tokenizer.add_tokens(TOKENS, special_tokens=True)
    tokenizer.bos_token = "<bos>"
    return tokenizer


def template(data_dir: Path, name: str) -> str:
    return (data_dir / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def unmarked(marked: str) -> str:
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", marked)


def encode(tokenizer, row):
    (found,) = Encoder(tokenizer).encode([parse("messages", row)])
    return found


def texts(tokenizer, examples) -> list[str]:
    """What is trained, a text a run, without blanks at the ends: those are the template's, not the model's."""
    found = []
    for one in examples:
        run: list[int] = []
        for token, weight in zip([*one.ids.tolist(), 0], [*one.mask.tolist(), 0.0], strict=True):
            if weight:
                run.append(token)
            elif run:
                found.append(tokenizer.decode(run).strip())
                run = []
    return found


def refuses(tokenizer, row) -> bool:
    """Whether the template itself raises (Gemma knows no system messages)."""
    try:
        tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
    except Exception:  # noqa: BLE001 - whatever it is, it is the template's
        return True
    return False


@pytest.mark.parametrize("name", TEMPLATES)
def test_marked_templates_are_as_in_transformers(tokenizer, data_dir, name):
    tokenizer.chat_template = template(data_dir, f"{name}_training")
    compared = 0
    for what, row in CONVERSATIONS.items():
        if refuses(tokenizer, row):
            assert (name, what) in (("gemma", "system"), ("gemma", "tool call"))
            assert isinstance(encode(tokenizer, row), RowError), what
            continue
        reference = tokenizer.apply_chat_template(
            row["messages"], tools=row.get("tools"), return_dict=True, return_assistant_tokens_mask=True
        )
        found = encode(tokenizer, row)
        if isinstance(found, RowError):  # these templates write no tool calls, so what is learned would be lost
            assert what == "tool call", (what, found)
            assert name in ("llama3", "gemma", "phi3"), (what, found)
            continue
        (one,) = found
        assert one.ids.tolist() == reference["input_ids"], what
        assert one.mask.astype(int).tolist() == reference["assistant_masks"], what
        compared += 1
    assert compared >= len(CONVERSATIONS) - 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_as_shipped_have_the_ids_of_transformers_and_the_answers(tokenizer, data_dir, name):
    tokenizer.chat_template = template(data_dir, name)
    for what, row in CONVERSATIONS.items():
        if refuses(tokenizer, row):
            assert (name, what) in (("gemma", "system"), ("gemma", "tool call"))
            assert isinstance(encode(tokenizer, row), RowError), what
            continue
        found = encode(tokenizer, row)
        if isinstance(found, RowError):
            assert what == "tool call", (what, found)
            continue
        messages = row["messages"]
        ends = (
            [i + 1 for i, m in enumerate(messages) if m["role"] == "assistant"] if len(found) > 1 else [len(messages)]
        )
        for one, end in zip(found, ends, strict=True):  # several where the template rewrites what was before
            reference = tokenizer.apply_chat_template(messages[:end], tools=row.get("tools"), return_dict=True)
            assert one.ids.tolist() == reference["input_ids"], what
        answers = [m for m in messages if m["role"] == "assistant"]
        for message, text in zip(answers, texts(tokenizer, found), strict=True):
            assert message["content"].strip() in text, what
            stop = re.search(
                r"(<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|end\|>)(\s*<\|(im_end|endoftext)\|>)?$", text
            )
            assert stop, (what, text)
            rest = text[: stop.start()].replace(message["content"].strip(), "", 1).strip()
            assert re.fullmatch(r"(<think>\s*</think>)?", rest) or "tool_calls" in message, (what, rest)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_its_marks_trains_the_same_text(tokenizer, data_dir, name):
    marked = template(data_dir, f"{name}_training")
    for what, row in CONVERSATIONS.items():
        tokenizer.chat_template = marked
        with_marks = encode(tokenizer, row)
        tokenizer.chat_template = unmarked(marked)
        without = encode(tokenizer, row)
        if isinstance(with_marks, RowError):
            assert isinstance(without, RowError), what
            continue
        assert [one.ids.tolist() for one in without] == [one.ids.tolist() for one in with_marks], what
        assert texts(tokenizer, without) == texts(tokenizer, with_marks), what


def test_reasoning_is_kept_taken_out_or_missed(tokenizer, data_dir):
    row = {"messages": [user("2+2?"), answer("4", reasoning_content="Two and two."), user("5?"), answer("No.")]}
    tokenizer.chat_template = template(data_dir, "qwen3")
    first, second = encode(tokenizer, row)
    assert texts(tokenizer, [first]) == ["<think>\nTwo and two.\n</think>\n\n4<|im_end|>"]
    assert texts(tokenizer, [second]) == ["<think>\n\n</think>\n\nNo.<|im_end|>"]
    assert "Two and two" not in tokenizer.decode(second.ids)  # as inference will see it
    (found,) = Encoder(tokenizer).encode([parse("messages", row, keep_reasoning=False)])
    assert "Two and two" not in tokenizer.decode(found[0].ids)
    tokenizer.chat_template = template(data_dir, "qwen2_5")
    assert "does not write its reasoning_content" in str(encode(tokenizer, row))


def test_double_bos_is_refused_and_pad_may_be_eos(tokenizer, data_dir):
    tokenizer.chat_template = template(data_dir, "llama3")
    before = tokenizer.pad_token
    tokenizer.pad_token = tokenizer.eos_token
    row = CONVERSATIONS["multi-turn"]
    (one,) = encode(tokenizer, row)
    assert one.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert texts(tokenizer, [one]) == ["Hello there.<|eot_id|>", "Nothing.<|eot_id|>", "Bye!<|eot_id|>"]
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert "twice at the start" in str(encode(tokenizer, row))
    tokenizer.pad_token = before


DATA = ("gsm8k/test.jsonl", "gsm8k/train.jsonl", "llamafactory/alpaca_en_demo.json", "llamafactory/identity.json")
DATA += ("llamafactory/glaive_toolcall_en_demo.json", "llamafactory/v1_sft_demo.jsonl")
DATA += ("fastchat/dummy_conversation.json", "axolotl_fixtures/alpaca.json", "axolotl_fixtures/conversation.json")
DATA += ("axolotl_fixtures/conversation.missingturns.json", "axolotl_fixtures/conversation.tokenized.json")


def test_all_real_files_are_understood(data_dir):
    """By detection, no row refused, and every answer in the text of its row is trained."""
    from sft_jax.config import SourceConfig
    from sft_jax.data.read.sources import open_sources
    from sft_jax.data.tokens.examples import encode_sources

    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "qwen2")
    tokenizer.chat_template = template(data_dir, "qwen2_5")
    found = sorted(str(f.relative_to(data_dir)) for f in data_dir.glob("*/*.json*") if f.parent.name in
                   {name.split("/")[0] for name in DATA})  # fmt: skip
    assert found == sorted(DATA)
    rows = {"gsm8k/test.jsonl": 1319, "fastchat/dummy_conversation.json": 500, "llamafactory/identity.json": 91}
    for name in DATA:
        if name == "gsm8k/train.jsonl":
            continue  # as the test split, and longer
        sources = open_sources([SourceConfig(path=str(data_dir / name))])
        encoder = Encoder(tokenizer)
        examples, report = encode_sources(sources, encoder, 32768)
        assert report.total("refused") == 0, name
        assert report.total("kept") == report.total("rows") == rows.get(name, len(sources[0])), name
        if name.endswith("tokenized.json"):
            continue
        assert set(report.stop_tokens) == {"<|im_end|>"}, name
        assert report.tally.notes[STRADDLING] == 0, name
        for i in range(0, len(examples), 7):
            row = sources[0].row(int(examples.row[i]))
            ids, mask = examples[i]
            trained = tokenizer.decode(ids[mask > 0])
            for message in row.messages:
                content = message.get("content", "").strip()
                assert message["role"] != "assistant" or content in trained, name


def test_a_tool_call_of_another_row_leaves_no_trace(tmp_path, data_dir):
    """Arguments are those of the row: no null for what other rows' calls have."""
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "qwen2")
    tokenizer.chat_template = template(data_dir, "qwen2_5")
    other = {"type": "function", "function": {"name": "route", "arguments": '{"from": "A", "to": null}'}}
    rows = [CONVERSATIONS["tool call"], {"messages": [user("Route?"), {"role": "assistant", "tool_calls": [other]}]}]
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from sft_jax.config import SourceConfig
    from sft_jax.data.read.sources import open_sources

    (source,) = open_sources([SourceConfig(path=str(tmp_path / "calls.jsonl"))])
    first, second = (found[0] for found in Encoder(tokenizer).encode(list(source.read(0, 2))))
    assert '{"name": "weather", "arguments": {"city": "Zürich"}}' in tokenizer.decode(first.ids)
    assert '{"name": "route", "arguments": {"from": "A", "to": null}}' in tokenizer.decode(second.ids)
