"""Long conversations and long texts: the same result as for short ones, in linear time and bounded memory."""

import copy

import numpy as np
import pytest
from kit import CHATML, CHATML_UNMARKED, make_tokenizer

from sft_jax.data.chat import local, segments, turns
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.read.limits import TEXT_BYTES
from sft_jax.data.read.rows import Conversation, Document, RowError

# Begins in another way once there are more than 150 messages, which no window can tell.
_REWRITING = "{{ 'Long:' if messages | length > 150 }}" + CHATML_UNMARKED
_TEMPLATES = {"marked": CHATML, "unmarked": CHATML_UNMARKED}
_REAL = ("qwen2_5", "qwen3", "llama3", "gemma", "phi3")


def chat(num, system=True):
    rng = np.random.default_rng(num)
    messages = [{"role": "system", "content": "Be brief, and answer every question."}] if system else []
    for i in range(num // 2):
        messages += [
            {"role": "user", "content": f"What is {i} plus {rng.integers(100)}, exactly?"},
            {"role": "assistant", "content": " ".join(["about"] * int(rng.integers(1, 4)))},
        ]
    return Conversation(messages, [None] * len(messages))


def encoded(template, row, train_on="assistant"):
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.add_tokens(["<|eot_id|>", "<end_of_turn>"], special_tokens=True)
    tokenizer.chat_template = template
    (one,) = Encoder(tokenizer, train_on).encode([row])
    return one


@pytest.fixture
def counted(monkeypatch):
    """The number of messages that are rendered."""
    render, counts = ChatTemplate.render, [0]

    def counting(self, messages, *given, **options):
        counts[0] += len(messages)
        return render(self, messages, *given, **options)

    monkeypatch.setattr(ChatTemplate, "render", counting)
    return counts


def same_by_windows_and_by_prefixes(template, row, monkeypatch, counted):
    by_windows, fast = encoded(template, row), counted[0]
    monkeypatch.setattr(local, "_LONG", 10**9)
    by_prefixes = encoded(template, row)
    assert len(by_windows) == len(by_prefixes)
    for one, other in zip(by_windows, by_prefixes, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.mask, other.mask)
        assert one.mask.any()
    return fast, counted[0] - fast


@pytest.mark.parametrize("name", _TEMPLATES)
def test_windows_find_what_prefixes_find(name, monkeypatch, counted):
    fast, slow = same_by_windows_and_by_prefixes(_TEMPLATES[name], chat(400), monkeypatch, counted)
    assert fast < slow / 3


@pytest.mark.parametrize("name", _REAL)
def test_windows_with_templates_of_models(name, data_dir, monkeypatch, counted):
    template = (data_dir / "templates" / f"{name}.jinja").read_text()
    same_by_windows_and_by_prefixes(template, chat(160, system=name != "gemma"), monkeypatch, counted)


def test_some_messages_are_not_supervised(monkeypatch, counted):
    row = chat(300)
    weights = [0.0 if m["role"] == "assistant" and i % 7 else None for i, m in enumerate(row.messages)]
    row = Conversation(row.messages, weights)
    same_by_windows_and_by_prefixes(CHATML_UNMARKED, row, monkeypatch, counted)


def test_time_is_linear(counted):
    used = []
    for num in (1000, 2000, 4000):
        before = counted[0]
        assert not isinstance(encoded(CHATML_UNMARKED, chat(num)), RowError)
        used.append(counted[0] - before)
    assert used[2] - used[1] < 2.2 * (used[1] - used[0])
    assert used[2] < 100 * 4000


def test_a_template_that_rewrites_is_split_or_refused(monkeypatch, counted):
    """What the windows cannot tell is located by whole prefixes, for as many messages as is quick."""
    row = chat(200)
    fast, _ = same_by_windows_and_by_prefixes(_REWRITING, row, monkeypatch, counted)
    assert fast > 10 * len(row.messages)
    monkeypatch.setattr(turns, "_MAX_RENDERED", 1000)
    refused = encoded(_REWRITING, row)
    assert "has 201 messages, too many to locate its answers" in str(refused)


def test_a_long_text_is_refused_before_it_is_tokenized(monkeypatch):
    tokenizer = make_tokenizer()
    text = "a b " * (TEXT_BYTES // 4 + 1)
    encoder = Encoder(tokenizer)
    monkeypatch.setattr(segments.SegmentEncoder, "__call__", lambda self, texts: [] if not texts else pytest.fail("no"))
    chats = Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": "b"}], [None, None])
    for row in (Document("", text), Document(text, "a"), chats):
        (refused,) = encoder.encode([row])
        assert "has a text of 2.5 MB, more than 2.5 MB; split it" in str(refused)


def test_a_long_text_has_the_tokens_of_its_parts():
    """Long texts are not split at special tokens, and not tokenized twice."""
    tokenizer = make_tokenizer()
    short, long = chat(20), chat(20)
    short.messages[0]["content"] = "a"
    long.messages[0]["content"] = "a " * segments._LONG + "a"
    (one,), (other,) = Encoder(tokenizer).encode([short, long])
    (after,) = Encoder(tokenizer).encode([short])[0:1]
    assert np.array_equal(one.ids, after[0].ids)
    end = int(np.flatnonzero(one.mask)[0]) - 20
    assert np.array_equal(one.ids[end:], other.ids[len(other.ids) - len(one.ids) + end :])
    assert np.array_equal(one.mask[end:], other.mask[len(other.ids) - len(one.ids) + end :])
