"""What holds for every conversation, tokenizer and pack: only the answers and their stop tokens are trained, and
documents in a row know nothing of each other."""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import CHATML, CHATML_UNMARKED, load_model, make_tokenizer, one_device, run_config, write_chats

from sft_jax.config import SourceConfig
from sft_jax.data.batches.loader import make_batch
from sft_jax.data.batches.packing import pack
from sft_jax.data.chat.encoder import MARKED_STRADDLING, STRADDLING, Encoded, Encoder
from sft_jax.data.chat.segments import SegmentEncoder
from sft_jax.data.read.formats import parse
from sft_jax.data.read.rows import RowError
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens.examples import encode_sources, join
from sft_jax.run.train import train
from sft_jax.training.cross_entropy import masked_cross_entropy
from sft_jax.training.losses import batch_loss

pytestmark = pytest.mark.smoke

_CORPORA = {
    "none": [],
    "words": ["the quick brown fox", "jumps over the lazy dog", "pack my box with five dozen jugs"] * 20,
    "unicode": ["äöü ßẞ 漢字かな交じり文", "עברית العربية हिन्दी", "👩‍👩‍👧 🎉🎉 ﷽", "naïve café", "1 22 333 4444"] * 20,
}


@cache
def tokenizer(corpus: str):
    """Byte-level BPE of different vocabularies; the last one is not byte-level, and joins words with their blanks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if corpus == "metaspace":
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
        special += ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
        made.train_from_iterator(_CORPORA["words"], trainer)
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator(_CORPORA[corpus], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|im_end|>")


_TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30).filter(lambda text: "<|" not in text)
_WORDS = st.sampled_from(["the fox", "jumps", "\n\n", "  indented", "naïve 漢字", "2 + 2 = 4", "👩‍👩‍👧", ""])
_CONTENT = _TEXT | st.lists(_WORDS, max_size=5).map(" ".join)


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(_CONTENT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(_CONTENT)})
        messages.append({"role": "assistant", "content": draw(_CONTENT), "train": draw(st.sampled_from([True, False]))})
    return messages


@settings(deadline=None, max_examples=150)
@given(
    messages=conversations(),
    corpus=st.sampled_from([*_CORPORA, "metaspace"]),
    marked=st.booleans(),
    train_on=st.sampled_from(["assistant", "last_assistant"]),
)
def test_trained_text_is_the_trained_turns_and_their_stops(messages, corpus, marked, train_on):
    made = tokenizer(corpus)
    made.chat_template = CHATML if marked else CHATML_UNMARKED
    encoder = Encoder(made, train_on)
    (found,) = encoder.encode([parse("messages", {"messages": messages})])
    answers = [m["content"] for m in messages if m["role"] == "assistant" and m["train"]]
    if not answers:
        assert isinstance(found, RowError)
        return
    if isinstance(found, RowError):  # only where words are nowhere but in an answer may a row be doubted
        assert "only inside a supervised answer" in str(found) or "the tokenizer drops the text" in str(found), found
        return
    (one,) = found
    plain = [{key: m[key] for key in ("role", "content")} for m in messages]
    assert one.ids.tolist() == made.apply_chat_template(plain, return_dict=True)["input_ids"]
    wanted = answers if train_on == "assistant" else answers[-1:]
    runs: list[list[int]] = [[]]
    for token, weight in zip(one.ids.tolist(), one.mask.tolist(), strict=True):
        if weight:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    texts = [made.decode(run, skip_special_tokens=False).strip() for run in runs if run]
    if corpus == "metaspace":  # keeps no difference between a blank and its own mark for one, nor some characters
        assert [text.endswith("<|im_end|>") for text in texts] == [True] * len(wanted)
        return
    if (
        encoder.tally.notes[STRADDLING] or encoder.tally.notes[MARKED_STRADDLING]
    ):  # a token of header and answer: blanks, which strip takes away
        wanted = [text.strip() for text in wanted]
        texts = [text.removesuffix("<|im_end|>").strip() + "<|im_end|>" for text in texts]
    assert texts == [f"{text}<|im_end|>".strip() for text in wanted]


@settings(deadline=None, max_examples=100)
@given(texts=st.lists(st.lists(_CONTENT | st.sampled_from(["<|im_start|>", "<|im_end|>"]), max_size=8), max_size=4))
def test_segments_are_as_the_whole(texts):
    """Ids and places of characters, for texts met for the first, second and third time."""
    made = tokenizer("unicode")
    encode = SegmentEncoder(made, CHATML)
    assert encode.splits
    assert not SegmentEncoder(tokenizer("metaspace"), CHATML).splits  # its blanks depend on where a text begins
    joined = ["".join(parts) for parts in texts]
    whole = made.backend_tokenizer.encode_batch(joined, add_special_tokens=False)
    for _ in range(3):
        for text, one, other in zip(joined, encode(joined), whole, strict=True):
            assert one.ids == other.ids
            assert [one.char_to_token(i) for i in range(len(text))] == [
                other.char_to_token(i) for i in range(len(text))
            ]
            assert [one.token_to_chars(i) for i in range(len(other.ids))] == [
                other.token_to_chars(i) for i in range(len(other.ids))
            ]


@pytest.fixture(scope="module")
def loss_and_gradients(tiny):
    """Summed loss of a batch and its gradients with respect to every weight, compiled once a shape."""
    _, split, params = load_model(tiny)
    compute = jax.jit(jax.value_and_grad(lambda p, batch: batch_loss(split.merge(p, {}), batch)["loss"]))
    return lambda batch: compute(params, jax.tree.map(jnp.asarray, batch))


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(2, 48), min_size=2, max_size=12),
    weights=st.sampled_from([(0.0, 1.0), (0.0, 0.5, 1.0, 2.0)]),
    seed=st.integers(0, 100),
)
def test_packed_is_unpacked(loss_and_gradients, sizes, weights, seed):
    """Loss and gradients of random examples in as few rows as they fit in, and of one a row."""
    rng = np.random.default_rng(seed)
    rows = [(rng.integers(0, 384, n).astype(np.int32), rng.choice(weights, n).astype(np.float32)) for n in sizes]
    examples = join([Encoded(*row) for row in rows], "rows")
    packed = pack(examples.num_tokens, rng.permutation(len(sizes)), 48)
    assert sorted(np.concatenate(packed).tolist()) == list(range(len(sizes)))
    alone = [np.array([i]) for i in range(len(sizes))]
    loss, gradients = loss_and_gradients(make_batch(examples, packed, 12, 48))
    expected, expected_gradients = loss_and_gradients(make_batch(examples, alone, 12, 48))
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.abs(other).max())))


def test_documents_in_a_row_know_nothing_of_each_other(tiny):
    """Another document in the middle of a row: the losses of its neighbours are the same to the bit."""
    model, _, _ = load_model(tiny)
    rng = np.random.default_rng(0)

    def row(middle):
        rows = [rng_a, middle, rng_b]
        examples = join([Encoded(ids.astype(np.int32), np.ones(len(ids), np.float32)) for ids in rows], "row")
        batch = make_batch(examples, [np.arange(3)], 1, 64)
        batch = jax.tree.map(jnp.asarray, batch)
        hidden = model(batch.inputs, batch.segment_ids, batch.positions)
        _, found = masked_cross_entropy(hidden, model.head(), batch.targets, batch.loss_mask)
        return np.asarray(found.loss)[0], np.asarray(batch.segment_ids)[0]

    rng_a, rng_b = rng.integers(4, 380, 20), rng.integers(4, 380, 22)
    before, segments = row(rng.integers(4, 380, 18))
    after, _ = row(rng.integers(4, 380, 18))
    apart = segments != 2
    assert np.array_equal(before[apart], after[apart])
    assert not np.array_equal(before[~apart], after[~apart])


def test_losses_by_source_are_those_of_each_source_alone(tiny, tmp_path):
    for seed, name in enumerate(("a.jsonl", "b.jsonl", "c.jsonl")):
        write_chats(tmp_path / name, 5, seed)
    given = [SourceConfig(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    examples, _ = encode_sources(open_sources(given), Encoder(make_tokenizer()), 128)
    rows = np.array_split(np.random.default_rng(0).permutation(len(examples)), 6)
    opened = load_model(tiny)[0]

    def sums(chosen):
        batch = jax.tree.map(jnp.asarray, make_batch(examples, chosen, len(chosen), 256))
        return batch_loss(opened, batch, num_sources=3)

    both = sums(rows)
    for source in range(3):
        mine = [row[examples.source[row] == source] for row in rows]
        alone = sums(mine)
        for key in ("loss", "weight"):
            np.testing.assert_allclose(both[f"source_{key}"][source], alone[key], rtol=1e-5)
    for key in ("loss", "weight"):
        np.testing.assert_allclose(both[f"source_{key}"].sum(), both[key], rtol=1e-5)


def test_weights_of_messages_weigh_the_loss(tiny, tmp_path):
    """Half the weight on an answer counts as half its loss, over the sum of weights."""
    made = make_tokenizer()
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "river market"},
                        {"role": "user", "content": "b"}, {"role": "assistant", "content": "north"}]}  # fmt: skip
    model, _, _ = load_model(tiny)

    def loss(first, second):
        row["messages"][1]["weight"], row["messages"][3]["weight"] = first, second
        ((one,),) = Encoder(made).encode([parse("messages", row)])
        batch = jax.tree.map(jnp.asarray, make_batch(join([one], "row"), [np.arange(1)], 1, 64))
        sums = batch_loss(model, batch)
        return float(sums["loss"]), float(sums["weight"])

    (first, n), (second, m) = loss(1, 0), loss(0, 1)
    np.testing.assert_allclose(loss(0.5, 2), (0.5 * first + 2 * second, 0.5 * n + 2 * m), rtol=1e-6)


def test_source_losses_are_in_the_metrics(tiny, tmp_path):
    for seed, name in enumerate(("a.jsonl", "b.jsonl")):
        write_chats(tmp_path / name, 10, seed)
    given = [SourceConfig(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]
    changes = {"data__train": given, "data__eval": given, "training__max_steps": 2}
    train(run_config(tiny, out=tmp_path / "run", **changes), one_device())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = {source.path for source in given}
    assert [set(row["source_loss"]) for row in rows if "loss" in row] == [names, names]
    held_out = [row for row in rows if "eval_loss" in row]
    assert held_out
    assert all(set(row["eval_source_loss"]) == names for row in held_out)
    low, high = sorted(held_out[0]["eval_source_loss"].values())
    assert low <= held_out[0]["eval_loss"] <= high
