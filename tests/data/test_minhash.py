"""MinHash against exact Jaccard similarities, and the search for near duplicates against a comparison of all pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.data.chat.encoded import Encoded
from sft_jax.data.lint.blocks import chunks, read_block
from sft_jax.data.lint.columns import mix, read_columns
from sft_jax.data.lint.minhash import (
    BAND_SIZE,
    NUM_BANDS,
    candidates,
    candidates_between,
    equal_entries,
    minima,
    sign,
    similar,
)
from sft_jax.data.lint.shingles import SIZE, Commonness, Side, of_all, of_question, of_targets, similarity
from sft_jax.data.tokens.examples import join

NUM = NUM_BANDS * BAND_SIZE


def side(sequences, masks=None):
    masks = masks or [[0] * (len(ids) // 2) + [1] * (len(ids) - len(ids) // 2) for ids in sequences]
    encoded = zip(sequences, masks, strict=True)
    examples = join([Encoded(np.asarray(ids, np.int32), np.asarray(m, np.float32)) for ids, m in encoded], "a.jsonl")
    return Side(examples, read_columns(examples))


def shingle_set(ids, keep=lambda t: True):
    return {tuple(ids[t : t + SIZE]) for t in range(len(ids) - SIZE + 1) if keep(t)}


def jaccard(a, b):
    return len(a & b) / len(a | b) if a | b else 0.0


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(0, 200), st.integers(0, 200), st.integers(0, 2**32))
def test_minima_agree_as_often_as_sets_are_similar(both, only_a, only_b, seed):
    """The estimate is binomial with the Jaccard similarity as its mean; five standard deviations off is wrong."""
    items = mix(np.random.default_rng(seed).integers(0, 2**62, both + only_a + only_b).astype(np.uint64))
    a, b = items[: both + only_a], np.concatenate([items[:both], items[both + only_a :]])
    signatures = [np.concatenate([*minima(one, np.ones(len(one), bool), np.zeros(1, np.int64))]) for one in (a, b)]
    exact = both / len(items)
    estimate = (signatures[0] == signatures[1]).mean()
    assert abs(estimate - exact) <= 5 * np.sqrt(exact * (1 - exact) / NUM) + 1 / NUM


def test_minima_are_unbiased():
    """Over many pairs, the mean estimate is the similarity within a hundredth."""
    items = mix(np.arange(4000 * 100)).reshape(4000, 100)
    starts, chosen = np.arange(4000) * 80, np.ones(4000 * 80, bool)
    a, b = (np.stack([*minima(one.reshape(-1), chosen, starts)]) for one in (items[:, :80], items[:, 20:]))
    np.testing.assert_allclose((a == b).mean(), 60 / 100, atol=0.01)
    found = (a == b).reshape(NUM_BANDS, BAND_SIZE, -1).all(axis=1).any(axis=0).mean()
    np.testing.assert_allclose(found, 1 - (1 - 0.6**BAND_SIZE) ** NUM_BANDS, atol=0.03)


sequences = st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=12), min_size=2, max_size=6)


@settings(deadline=None)
@given(sequences)
def test_similarity_is_that_of_the_sets(given_ids):
    one = side(given_ids)
    i, j = (index.reshape(-1) for index in np.indices((len(given_ids), len(given_ids))))
    for choose, keep in (
        (of_all, lambda k, t: True),
        (of_question, lambda k, t: t + SIZE <= len(given_ids[k]) // 2),
        (of_targets, lambda k, t: t + SIZE - 1 >= len(given_ids[k]) // 2),
    ):
        sets = [shingle_set(ids, lambda t, k=k, keep=keep: keep(k, t)) for k, ids in enumerate(given_ids)]
        expected = [jaccard(sets[a], sets[b]) for a, b in zip(i, j, strict=True)]
        np.testing.assert_array_equal(similarity(one, i, one, j, choose), expected)


def varied(rng, num, length, changes):
    """Sequences, some of which are an earlier one with a few other tokens."""
    made = []
    for k in range(num):
        if made and k % 3 == 0:
            ids = made[rng.integers(len(made))].copy()
            ids[rng.integers(0, len(ids), rng.integers(0, changes))] = rng.integers(10**6, size=1)
        else:
            ids = rng.integers(0, 10**6, rng.integers(length // 2, length))
        made.append(ids)
    return [ids.tolist() for ids in made]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32))
def test_near_duplicates_are_those_of_all_pairs(seed):
    """No pair is found that is not similar; of the similar ones, hardly any is missed."""
    made = varied(np.random.default_rng(seed), 120, 120, 12)
    one = side(made)
    found = similar(one, one, candidates(sign(one, np.arange(len(made)), of_all)), (of_all,))
    sets = [shingle_set(ids) for ids in made]
    exact = {(i, j) for j in range(len(made)) for i in range(j) if jaccard(sets[i], sets[j]) >= 0.8}
    pairs = set(zip(found.i.tolist(), found.j.tolist(), strict=True))
    assert pairs <= exact
    assert len(pairs) >= 0.95 * len(exact) - 1
    for i, j, value in zip(found.i, found.j, found.similarity, strict=True):
        assert value == jaccard(sets[i], sets[j])
    again = sign(one, np.arange(len(made)), of_all)
    np.testing.assert_array_equal(again.bands, sign(side(made), np.arange(len(made)), of_all).bands)
    first, second = made[:60], made[60:]
    left, right = side(first), side(second)
    between = candidates_between(*(sign(one, np.arange(60), of_all) for one in (left, right)))
    found = similar(left, right, between, (of_all,))
    assert {(i, j + 60) for i, j in zip(found.i.tolist(), found.j.tolist(), strict=True)} <= exact


def test_shingles_of_a_template_are_common():
    """A frame that all examples have makes short examples similar, and does not count."""
    rng = np.random.default_rng(0)
    frame = list(range(100))
    made = [frame + rng.integers(1000, 10**6, 20).tolist() for _ in range(100)]
    one = side(made)
    common = Commonness(one.examples)
    assert similarity(one, np.asarray([0]), one, np.asarray([1]), of_all)[0] > 0.6

    def rare(columns, block, hashes):
        return ~common.of(hashes)

    assert similarity(one, np.asarray([0]), one, np.asarray([1]), rare)[0] == 0.0
    assert candidates(sign(one, np.arange(100), rare)).shape == (2, 0)
    assert candidates(sign(one, np.arange(100), of_all)).shape[1] > 0


def test_equal_entries():
    at, which = equal_entries(np.asarray([7, 5, 7]), np.asarray([5, 7, 9]))
    assert list(zip(at.tolist(), which.tolist(), strict=True)) == [(1, 0), (0, 1), (2, 1)]
    assert equal_entries(np.asarray([7, 5, 7]), np.asarray([7]), 1)[0].tolist() == [0]


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 100))
def test_chunks_cover_everything_in_order(lengths, size):
    lengths = np.asarray(lengths, np.int64)
    parts = [lengths[part] for part in chunks(lengths, size)]
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, np.int64), *parts]), lengths)
    assert all(len(part) == 1 or part.sum() <= size for part in parts)


def test_blocks_read_any_examples():
    one = side([[1, 2, 3], [4, 5], [6, 7, 8, 9]])
    block = read_block(one.examples, np.asarray([2, 0, 0]))
    assert block.ids.tolist() == [6, 7, 8, 9, 1, 2, 3, 1, 2, 3]
    assert block.owner.tolist() == [0] * 4 + [1] * 3 + [2] * 3
    assert block.position.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
    assert block.weights.tolist() == [0, 0, 1, 1, 0, 1, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("mask", "begins", "ends"),
    [([0, 0, 1, 1], 2, 4), ([0, 1, 0, 1], 3, 4), ([1, 1, 1, 1], 0, 4), ([0, 1, 1, 0], 1, 3), ([0, 1, 0, 0], 1, 2)],
)
def test_the_answer_is_the_last_run(mask, begins, ends):
    columns = side([[5, 6, 7, 8]], [mask]).columns
    assert (columns.begins.tolist(), columns.ends.tolist()) == ([begins], [ends])
    assert columns.targets.tolist() == [sum(mask[1:])]
