"""The plan of a run loses nothing, cuts nothing, and is the same every time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.data.batches.packing import buckets, pack, plan_run

pytestmark = pytest.mark.smoke


def test_docstring_example():
    rows = pack(np.array([5, 3, 4, 2]), np.arange(4), 7)
    assert [row.tolist() for row in rows] == [[0, 3], [2, 1]]
    in_order = pack(np.array([5, 3, 4, 2]), np.arange(4), 7, rearrange=False)
    assert [row.tolist() for row in in_order] == [[0], [1, 2], [3]]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200),
    batch_size=st.integers(1, 7),
    epochs=st.integers(1, 3),
    packing=st.booleans(),
    shuffle=st.booleans(),
    seed=st.integers(0, 5),
)
def test_every_example_once_an_epoch_and_no_row_overfull(lengths, batch_size, epochs, packing, shuffle, seed):
    lengths = np.array(lengths)
    arguments = (lengths, 50, batch_size, epochs, None, seed, packing, shuffle)
    plan = plan_run(*arguments)
    start = 0
    for end in plan.epoch_ends:
        rows = [row for step in range(start, end) for row in plan.rows_of(step)]
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
        assert all(lengths[row].sum() <= 50 for row in rows)
        assert all(len(plan.rows_of(step)) == batch_size for step in range(start, end - 1))
        if not shuffle:
            assert np.concatenate(rows).tolist() == list(range(len(lengths)))
        start = end
    again = plan_run(*arguments)
    assert all(np.array_equal(getattr(plan, name), getattr(again, name)) for name in ("items", "rows", "steps"))


def test_epochs_differ_and_seeds_differ():
    lengths = np.full(100, 10)
    plan = plan_run(lengths, 10, 5, 2)
    first, second = plan.items[:100], plan.items[100:]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, plan_run(lengths, 10, 5, 2, seed=1).items[:100])


def test_max_steps_fractions_and_weights():
    lengths = np.full(10, 4)
    assert plan_run(lengths, 4, 2, 1, max_steps=12).num_steps == 12
    assert plan_run(lengths, 4, 2, 1, max_steps=0).num_steps == 0
    assert plan_run(lengths, 4, 2, 1.4).num_steps == 7
    weighted = plan_run(lengths, 4, 2, 100, repeats=np.array([2.0] * 5 + [0.25] * 5))
    counts = np.bincount(weighted.items, minlength=10)
    assert (counts[:5] == 200).all()
    assert 80 < counts[5:].sum() < 180


def test_lengths_like_real_ones_fill_the_rows():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.6, 5000).astype(int), 8, 2048)
    plan = plan_run(lengths, 2048, 16, 1)
    assert lengths.sum() / ((len(plan.rows) - 1) * 2048) > 0.97


def test_buckets_are_the_worked_example():
    assert [buckets(n) for n in (2048, 640, 100)] == [
        [128, 256, 512, 1024, 2048],
        [128, 256, 384, 640],
        [8, 16, 32, 56, 100],
    ]
    assert all(len(buckets(n)) <= 5 and buckets(n)[-1] == n for n in range(2, 3000))


@pytest.mark.parametrize("shuffle", [False, True])
def test_without_packing_rows_are_as_long_as_their_step_needs(shuffle):
    lengths = np.random.default_rng(0).integers(5, 900, 1003)
    plan = plan_run(lengths, 1024, 8, 2, packing=False, shuffle=shuffle)
    assert np.bincount(plan.items).tolist() == [2] * 1003  # each example once an epoch
    for step in range(plan.num_steps):
        longest = max(lengths[row].sum() for row in plan.rows_of(step))
        assert plan.lengths[step] == min(size for size in buckets(1024) if size >= longest)
        assert all(len(row) == 1 for row in plan.rows_of(step))
    filled = lengths[plan.items].sum() / plan.num_tokens
    assert filled > (0.65 if shuffle else 0.4)
    packed = plan_run(lengths, 1024, 8, 2)
    assert set(packed.lengths) == {1024}
    assert packed.num_tokens == 1024 * (len(packed.rows) - 1)
