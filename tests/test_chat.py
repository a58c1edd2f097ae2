"""Ids and masks: what is trained is the assistant's words and the stop token, whatever the template."""

import numpy as np
import pytest
from kit import CHATML, CHATML_UNMARKED, conversations, make_tokenizer, write_jsonl

from sft_jax.config import SourceConfig
from sft_jax.data.chat import Encoder, RowError
from sft_jax.data.examples import encode_sources
from sft_jax.data.loader import make_batch
from sft_jax.data.sources import open_sources
from sft_jax.errors import UserError

pytestmark = pytest.mark.smoke


@pytest.fixture
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    yield tokenizer
    tokenizer.chat_template = CHATML


def trained_text(tokenizer, encoded) -> str:
    return tokenizer.decode([i for i, trained in zip(encoded.ids, encoded.mask, strict=True) if trained])


def test_mask_is_transformers_own(tokenizer):
    rows = conversations(20)
    reference = tokenizer.apply_chat_template(
        [row["messages"] for row in rows], return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = Encoder(tokenizer).encode("messages", rows)
    assert [e.ids for e in encoded] == reference["input_ids"]
    assert [[int(m) for m in e.mask] for e in encoded] == reference["assistant_masks"]


def test_trained_text_is_the_answers_and_their_stop_tokens(tokenizer):
    rows = conversations(20)
    for template in (CHATML, CHATML_UNMARKED):
        tokenizer.chat_template = template
        encoder = Encoder(tokenizer)
        for row, encoded in zip(rows, encoder.encode("messages", rows), strict=True):
            answers = [m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"]
            assert trained_text(tokenizer, encoded) == "".join(answers)
        assert set(encoder.stop_counts) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_unmarked_template_gives_the_same(tokenizer):
    rows = conversations(20)
    marked = Encoder(tokenizer).encode("messages", rows)
    tokenizer.chat_template = CHATML_UNMARKED
    assert Encoder(tokenizer).encode("messages", rows) == marked


def test_last_assistant_and_all(tokenizer):
    row = conversations(2)[1]
    (last,) = Encoder(tokenizer, "last_assistant").encode("messages", [row])
    assert trained_text(tokenizer, last) == row["messages"][-1]["content"] + "<|im_end|>"
    (everything,) = Encoder(tokenizer, "all").encode("messages", [row])
    assert all(everything.mask)


def test_prompt_and_completion(tokenizer):
    encoder = Encoder(tokenizer)
    (plain,) = encoder.encode("prompt-completion", [{"prompt": "river", "completion": " mountain bridge"}])
    assert trained_text(tokenizer, plain) == " mountain bridge<|im_end|>"
    assert tokenizer.decode(plain.ids) == "river mountain bridge<|im_end|>"
    row = {
        "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "seen before"}],
        "completion": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "new"}],
    }
    (chat,) = encoder.encode("prompt-completion", [row])
    assert trained_text(tokenizer, chat) == "new<|im_end|>"


def test_a_token_across_the_edge_is_counted_and_not_trained(tokenizer):
    encoder = Encoder(tokenizer)
    (encoded,) = encoder.encode("prompt-completion", [{"prompt": "the riv", "completion": "er market"}])
    assert encoder.num_straddling > 0
    assert trained_text(tokenizer, encoded) == " market<|im_end|>"


def test_text_is_all_targets_and_ends_once(tokenizer):
    (encoded,) = Encoder(tokenizer).encode("text", [{"text": "winter orchard"}])
    assert all(encoded.mask)
    assert tokenizer.decode(encoded.ids) == "winter orchard<|im_end|>"
    (other,) = Encoder(tokenizer, stop_token="<pad>").encode("text", [{"text": "winter orchard"}])
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
            Encoder(tokenizer).encode("messages", rows)


def test_a_template_that_rewrites_history_is_refused(tokenizer):
    tokenizer.chat_template = CHATML_UNMARKED.replace(
        "{% for m in messages %}", "{% for m in messages %}{{ messages | length }}"
    )
    with pytest.raises(RowError, match="renders earlier messages differently"):
        Encoder(tokenizer).encode("messages", conversations(2)[1:])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"content": "a"}]}, "message 0: 'role' is missing"),
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
    assert (len(dropped), report.dropped, report.truncated) == (1, 2, 0)
    cut, report = encode("truncate")
    assert (len(cut), report.truncated, report.dropped_without_targets) == (2, 1, 1)
    ids, mask = cut[1]
    assert len(ids) == 32
    assert ids[-1] != tokenizer.eos_token_id  # a cut answer is not taught to stop
    assert mask.any()
    assert report.targets_lost > 0
    with pytest.raises(UserError, match=r"long.jsonl row 1: \d+ tokens are more than data.max_length 32"):
        encode("error")


def test_batch_docstring_example():
    from sft_jax.data.examples import Examples

    examples = Examples(
        ids=np.array([5, 6, 2, 7, 2], np.int32),
        mask=np.array([0, 1, 1, 0, 1], bool),
        offsets=np.array([0, 3, 5]),
        source=np.zeros(2, np.int32),
        row=np.arange(2),
        names=("a.jsonl",),
        weights=(1.0,),
        stop_ids=(2,),
    )
    batch = make_batch(examples, [np.array([0, 1])], 2, 5)
    assert batch.inputs[0].tolist() == [5, 6, 7, 0, 0]
    assert batch.targets[0].tolist() == [6, 2, 2, 0, 0]
    assert batch.loss_mask[0].tolist() == [1, 1, 1, 0, 0]
    assert batch.segment_ids[0].tolist() == [1, 1, 2, 0, 0]
    assert batch.positions[0].tolist() == [0, 1, 0, 0, 0]
    assert not batch.segment_ids[1].any()
    assert not batch.loss_mask[1].any()
