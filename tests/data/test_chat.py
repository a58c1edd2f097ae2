"""Ids and masks: what is trained is the assistant's words and the stop token, whatever the template."""

import dataclasses
from datetime import date

import numpy as np
import pytest
from kit import CHATML, CHATML_UNMARKED, conversations, make_tokenizer, write_jsonl

from sft_jax.config import SourceConfig
from sft_jax.data.batches.loader import make_batch
from sft_jax.data.chat.encoder import JOINED, STRADDLING, Encoded, Encoder, context_ids, prompt_ids
from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.read.formats import parse
from sft_jax.data.read.rows import RowError
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens.examples import encode_sources, join
from sft_jax.errors import UserError

pytestmark = pytest.mark.smoke


def trained_text(tokenizer, encoded) -> str:
    return tokenizer.decode([i for i, trained in zip(encoded.ids, encoded.mask, strict=True) if trained])


def encode(encoder, rows, row_format="messages"):
    """One example a row; a row that cannot be trained on raises its reason."""
    examples = []
    for result in encoder.encode([parse(row_format, row) for row in rows]):
        if isinstance(result, RowError):
            raise result
        assert len(result) == 1
        examples += result
    return examples


def test_mask_is_transformers_own(tokenizer):
    rows = conversations(20)
    reference = tokenizer.apply_chat_template(
        [row["messages"] for row in rows], return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = encode(Encoder(tokenizer), rows)
    assert [e.ids.tolist() for e in encoded] == reference["input_ids"]
    assert [[int(m) for m in e.mask] for e in encoded] == reference["assistant_masks"]


def test_trained_text_is_the_answers_and_their_stop_tokens(tokenizer):
    rows = conversations(20)
    for template in (CHATML, CHATML_UNMARKED):
        tokenizer.chat_template = template
        encoder = Encoder(tokenizer)
        for row, encoded in zip(rows, encode(encoder, rows), strict=True):
            answers = [m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"]
            assert trained_text(tokenizer, encoded) == "".join(answers)
        assert set(encoder.tally.stops) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_unmarked_template_gives_the_same(tokenizer):
    rows = conversations(20)
    marked = encode(Encoder(tokenizer), rows)
    tokenizer.chat_template = CHATML_UNMARKED
    for one, other in zip(encode(Encoder(tokenizer), rows), marked, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.mask.tolist() == other.mask.tolist()


def test_last_assistant_and_all(tokenizer):
    row = conversations(2)[1]
    (last,) = encode(Encoder(tokenizer, "last_assistant"), [row])
    assert trained_text(tokenizer, last) == row["messages"][-1]["content"] + "<|im_end|>"
    encoder = Encoder(tokenizer, "all")
    (everything,) = encode(encoder, [row])
    assert all(everything.mask)
    assert sum(encoder.tally.targets.values()) == len(everything.ids)


def test_prompt_and_completion(tokenizer):
    encoder = Encoder(tokenizer)
    (plain,) = encode(encoder, [{"prompt": "river", "completion": " mountain bridge"}], "prompt-completion")
    assert trained_text(tokenizer, plain) == " mountain bridge<|im_end|>"
    assert tokenizer.decode(plain.ids) == "river mountain bridge<|im_end|>"
    row = {
        "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "seen before"}],
        "completion": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "new"}],
    }
    (chat,) = encode(encoder, [row], "prompt-completion")
    assert trained_text(tokenizer, chat) == "new<|im_end|>"


def test_rows_of_different_kinds_side_by_side(tokenizer):
    chat = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "market"}]}
    rows = [{"prompt": "river", "completion": " bridge"}, chat, {"prompt": "north", "completion": " winter"}]
    texts = [trained_text(tokenizer, one) for one in encode(Encoder(tokenizer), rows, "prompt-completion")]
    assert texts == [" bridge<|im_end|>", "market<|im_end|>", " winter<|im_end|>"]


def test_a_token_across_the_edge_is_counted_and_not_trained(tokenizer):
    encoder = Encoder(tokenizer)
    (encoded,) = encode(encoder, [{"prompt": "the riv", "completion": "er market"}], "prompt-completion")
    assert encoder.tally.notes[STRADDLING] > 0
    assert trained_text(tokenizer, encoded) == " market<|im_end|>"


def test_a_blank_at_the_end_of_a_prompt_is_the_next_words(tokenizer):
    """The tokenizer joins the two; without that word, only the stop token would be trained."""
    encoder = Encoder(tokenizer)
    (encoded,) = encode(encoder, [{"prompt": "the ", "completion": "market"}], "prompt-completion")
    assert trained_text(tokenizer, encoded) == " market<|im_end|>"
    assert (encoder.tally.notes[JOINED], encoder.tally.notes[STRADDLING]) == (1, 0)
    for completion in ("et", "et<|im_end|>", "et "):
        row = {"prompt": "the mark", "completion": completion}
        with pytest.raises(RowError, match="only the stop token would be supervised"):
            encode(encoder, [row], "prompt-completion")
        encode(Encoder(tokenizer, "all"), [row], "prompt-completion")
    assert trained_text(tokenizer, *encode(encoder, [{"prompt": "a", "completion": " "}], "prompt-completion"))

    tokenizer.chat_template = CHATML_UNMARKED.replace("+ '\n' }}{% if", "+ ': ' }}{% if").replace(
        "assistant\n", "assistant: "
    )
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "market"}]}
    encoder = Encoder(tokenizer)
    (encoded,) = encode(encoder, [chat])
    assert trained_text(tokenizer, encoded) == " market<|im_end|>"
    assert encoder.tally.notes[JOINED] == 1
    before = encoded.ids.tolist()[: int(np.flatnonzero(encoded.mask)[0])]
    assert prompt_ids(tokenizer, chat["messages"][:1]) == before  # generation continues from what was trained
    assert context_ids(tokenizer, "the ") == context_ids(tokenizer, "the")
    assert context_ids(tokenizer, "the\n") != context_ids(tokenizer, "the")

    tokenizer.chat_template = CHATML_UNMARKED.replace("+ '\n' }}{% if", "+ ' the mark' }}{% if").replace(
        "assistant\n", "assistant the mark"
    )
    chat["messages"][1]["content"] = "et"
    with pytest.raises(
        RowError, match="message 1: the only token of the answer also contains characters of the prompt"
    ):
        encode(Encoder(tokenizer), [chat])
    encode(Encoder(tokenizer, "all"), [chat])
    chat["messages"][1]["content"] = "et river"
    (encoded,) = encode(Encoder(tokenizer), [chat])
    assert trained_text(tokenizer, encoded) == " river<|im_end|>"


def test_a_mark_around_the_header_is_noted(tokenizer):
    note = "supervised turns that include the turn header, because {% generation %} does"
    header, rows = "{{ '<|im_start|>' + m['role'] + '\n' }}", conversations(2)
    enclosing = CHATML.replace(header, "").replace("{% generation %}", f"{{% generation %}}{header}")
    enclosing = enclosing.replace("{% else %}", f"{{% else %}}{header}")
    assert enclosing != CHATML
    for template, is_noted in ((CHATML, False), (enclosing, True)):
        tokenizer.chat_template = template
        encoder = Encoder(tokenizer)
        encode(encoder, rows)
        turns = sum(message["role"] == "assistant" for row in rows for message in row["messages"])
        assert encoder.tally.notes[note] == (turns if is_noted else 0)


def test_text_is_all_targets_and_ends_once(tokenizer):
    (encoded,) = encode(Encoder(tokenizer), [{"text": "winter orchard"}], "text")
    assert all(encoded.mask)
    assert tokenizer.decode(encoded.ids) == "winter orchard<|im_end|>"
    (other,) = encode(Encoder(tokenizer, stop_token="<pad>"), [{"text": "winter orchard"}], "text")
    assert tokenizer.decode(other.ids) == "winter orchard<pad>"


def test_templates_that_cannot_teach_to_stop_are_refused(tokenizer):
    rows = conversations(1)
    outside = CHATML.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}")
    without = CHATML_UNMARKED.replace("m['content'] + '<|im_end|>' }}{{ '\n' }}", "m['content'] }}{{ '\n' }}")
    assert outside != CHATML
    assert without != CHATML_UNMARKED
    for template in (outside, without):
        tokenizer.chat_template = template
        with pytest.raises(RowError, match="stop"):
            encode(Encoder(tokenizer), rows)


def test_a_template_that_rewrites_history_gives_an_example_a_turn(tokenizer):
    """The last answer alone begins with a thought, so no text has two answers as inference sees them."""
    rewriting = CHATML.replace("{% generation %}", "{% generation %}{% if loop.last %}<think></think>{% endif %}")
    assert rewriting != CHATML
    (row,) = conversations(2)[1:]
    answers = [i for i, m in enumerate(row["messages"]) if m["role"] == "assistant"]
    assert len(answers) == 2
    for template in (rewriting, rewriting.replace("{% generation %}", "").replace("{% endgeneration %}", "")):
        tokenizer.chat_template = template
        encoder = Encoder(tokenizer)
        (examples,) = encoder.encode([parse("messages", row)])
        for i, one in zip(answers, examples, strict=True):
            assert trained_text(tokenizer, one) == f"<think></think>{row['messages'][i]['content']}<|im_end|>"
            seen = tokenizer.apply_chat_template(row["messages"][:i], add_generation_prompt=True, tokenize=False)
            assert tokenizer.decode(one.ids).startswith(seen)
        assert encoder.tally.notes["conversations split, because the template rewrites earlier turns"] == 1
        with pytest.raises(RowError, match="train_on=all would supervise some turns twice; use train_on=assistant"):
            encode(Encoder(tokenizer, "all"), [row])


def test_answers_that_no_prompt_comes_before(tokenizer):
    """An assistant that speaks first, and a generation prompt that continues differently from how answers begin."""
    greeting = {"messages": [{"role": "assistant", "content": "market"}, *conversations(2)[1]["messages"]]}
    tokenizer.chat_template = CHATML_UNMARKED
    (one,) = encode(Encoder(tokenizer), [greeting])
    assert trained_text(tokenizer, one).startswith("market<|im_end|>")


def test_a_thought_that_the_generation_prompt_opens(tokenizer):
    """It is the beginning of each trained turn, and the answer's own thought, or none, is closed behind it."""
    opened = CHATML_UNMARKED.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    assert opened != CHATML_UNMARKED
    tokenizer.chat_template = opened
    for thoughts in ({}, {"reasoning_content": "north of the river"}):
        messages = [
            message | (thoughts if message["role"] == "assistant" else {})
            for message in conversations(2)[1]["messages"]
        ]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        encoder = Encoder(tokenizer)
        (examples,) = encoder.encode([parse("messages", {"messages": messages})])
        for i, one in zip(answers, examples, strict=True):
            prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, tokenize=False)
            thought = thoughts.get("reasoning_content", "")
            expected = f"{thought}\n</think>\n\n".lstrip("\n") + f"{messages[i]['content']}<|im_end|>"
            assert tokenizer.decode(one.ids) == f"{prompt}{expected}\n"
            assert trained_text(tokenizer, one) == expected
        note = "answers without reasoning, given an empty block because the generation prompt opens it"
        assert encoder.tally.notes[note] == (0 if thoughts else 2)


def test_an_answer_with_the_stop_token_inside_is_refused(tokenizer):
    row = conversations(1)[0]
    row["messages"][-1]["content"] = "river <|im_end|> market"
    for template in (CHATML, CHATML_UNMARKED):
        tokenizer.chat_template = template
        with pytest.raises(RowError, match=r"the answer contains the stop token '<\|im_end\|>'"):
            encode(Encoder(tokenizer), [row])


def test_a_mark_around_the_question_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% generation %}{% for m in messages %}{{ m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% endgeneration %}"
    )
    row = {"messages": conversations(2)[1]["messages"][:2]}
    with pytest.raises(RowError, match=r"its content appears only inside a supervised answer|the answer contains"):
        encode(Encoder(tokenizer), [row])


def test_an_answer_is_put_after_the_prompt_that_inference_uses(tokenizer):
    """Here the text begins with how many messages there are, which is another number as soon as there is an answer."""
    tokenizer.chat_template = "{{ messages | length }}" + CHATML_UNMARKED
    (row,) = conversations(2)[1:]
    answers = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    encoder = Encoder(tokenizer)
    (examples,) = encoder.encode([parse("messages", row)])
    for i, one in zip(answers, examples, strict=True):
        prompt = tokenizer.apply_chat_template(row["messages"][:i], add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(one.ids) == f"{prompt}{row['messages'][i]['content']}<|im_end|>\n"
        assert trained_text(tokenizer, one) == f"{row['messages'][i]['content']}<|im_end|>"
    note = "answers moved after the generation prompt, because the template renders it differently"
    assert encoder.tally.notes[note] == 2


def test_a_prompt_that_no_answer_follows_is_refused(tokenizer):
    """What the generation prompt ends with is neither in the template's answers nor the beginning of a thought."""
    tokenizer.chat_template = CHATML_UNMARKED.replace("assistant\n' }}{% endif %}", "assistant\nSure!' }}{% endif %}")
    with pytest.raises(RowError, match=r"message 3: the template renders another context before an answer .*Sure!"):
        encode(Encoder(tokenizer), conversations(2)[1:])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"content": "a"}]}, "message 0: 'role' is missing"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "role 'asistant' is unknown; did you mean 'assistant'"),
        ({"messages": [{"role": "user"}]}, "message 0: 'content' is missing"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant message"),
        ({"messages": []}, "must be a list of messages"),
    ],
)
def test_bad_rows_are_named(tokenizer, tmp_path, row, words):
    path = write_jsonl(tmp_path / "bad.jsonl", [*conversations(3), row])
    with pytest.raises(UserError, match=f"bad.jsonl row 3: .*{words}"):
        encode_sources(open_sources([SourceConfig(path=str(path))]), Encoder(tokenizer), 128)


def test_overlong_rows(tokenizer, tmp_path):
    long = {"prompt": "river " * 3, "completion": "market " * 60}
    hopeless = {"prompt": "river " * 60, "completion": "market"}
    path = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a", "completion": "b"}, long, hopeless])

    def encode(overlong):
        sources = open_sources([SourceConfig(path=str(path))])
        return encode_sources(sources, Encoder(tokenizer), 32, overlong)

    dropped, report = encode("drop")
    assert (len(dropped), report.total("dropped"), report.total("truncated")) == (1, 2, 0)
    cut, report = encode("truncate")
    assert (len(cut), report.total("truncated"), report.total("dropped_without_targets")) == (2, 1, 1)
    ids, mask = cut[1]
    assert len(ids) == 32
    assert ids[-1] != tokenizer.eos_token_id  # a cut answer is not taught to stop
    assert mask.any()
    assert report.total("targets_lost") > 0
    with pytest.raises(UserError, match=r"long.jsonl row 1: \d+ tokens are more than data.max_length 32"):
        encode("error")


def test_batch_docstring_example():
    examples = join(
        [
            Encoded(np.array([5, 6, 2], np.int32), np.array([0, 1, 1], np.float32)),
            Encoded(np.array([7, 2], np.int32), np.array([0, 0.5], np.float32)),
        ],
        "a.jsonl",
    )
    batch = make_batch(examples, [np.array([0, 1])], 2, 5)
    assert batch.inputs[0].tolist() == [5, 6, 7, 0, 0]
    assert batch.targets[0].tolist() == [6, 2, 2, 0, 0]
    assert batch.loss_mask[0].tolist() == [1, 1, 0.5, 0, 0]
    assert batch.segment_ids[0].tolist() == [1, 1, 2, 0, 0]
    assert batch.positions[0].tolist() == [0, 1, 0, 0, 0]
    assert not batch.segment_ids[1].any()
    assert not batch.loss_mask[1].any()


@pytest.mark.parametrize("start", ["", "\n", "\n\n ", "{#- a comment -#}\n"])
def test_the_day_that_a_template_tells(start):
    """Without a day the text is transformers' own of today, with one only the day differs."""
    tokenizer = make_tokenizer()
    dated = "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y, %-m') %}{%- endif %}"
    tokenizer.chat_template = start + dated + "\n{{ 'day ' + day + ' ' }}" + CHATML
    messages = conversations(1)[0]["messages"]
    today = date.today()
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert date.today() == today, "midnight; run this again"
    template = ChatTemplate(tokenizer.chat_template)
    assert template.uses_date
    assert template.render(messages)[0] == expected
    assert dataclasses.replace(template, today=today.isoformat()).render(messages)[0] == expected
    other = dataclasses.replace(template, today="2024-02-09")
    told = f"{today:%d %b %Y}, {today.month}"
    assert other.render(messages)[0] == expected.replace(told, "09 Feb 2024, 2")
    assert [expected[a:b] for a, b in template.render(messages)[1]] == [
        other.render(messages)[0][a:b] for a, b in other.render(messages)[1]
    ]
    ((one,),) = Encoder(tokenizer, today="2024-02-09").encode([parse("messages", conversations(1)[0])])
    assert "09 Feb 2024, 2" in tokenizer.decode(one.ids)
    tokenizer.chat_template = CHATML
    assert Encoder(tokenizer, today="2024-02-09").today is None  # no part of what is kept
