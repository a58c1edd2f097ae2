"""A stream trains the same examples as a plan would, again and again, from any position on and on any mesh."""

import dataclasses
import json
import shutil
from collections import Counter

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import conversations, losses, make_tokenizer, one_device, run_config, write_jsonl

from sft_jax.config import SourceConfig
from sft_jax.data.batches import streaming
from sft_jax.data.batches.packing import sequence_lengths
from sft_jax.data.batches.streaming import stream
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.sources import Source, open_sources
from sft_jax.data.tokens.examples import encode_sources
from sft_jax.errors import UserError
from sft_jax.run import due
from sft_jax.run.train import train
from sft_jax.sharding import make_mesh


@pytest.fixture
def config(tiny, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", conversations(40))
    write_jsonl(tmp_path / "b.jsonl", conversations(20, seed=1))
    given = [SourceConfig(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]
    return run_config(tiny, out=tmp_path / "run", data__train=given, data__streaming=True)


def batches(config, num, mesh=None, state=None):
    groups = [source.path for source in config.data.train]
    loader = stream(config, Encoder(make_tokenizer()), groups, mesh or make_mesh(devices=one_device()), 512)
    if state is not None:
        loader.set_state(state)
    found, states = [], []
    iterator = iter(loader)
    for _ in range(num):
        found.append(jax.tree.map(np.asarray, next(iterator)))
        states.append(loader.get_state())
    return found, states


def examples_of(batch):
    """Each example of a batch as its tokens, mask and source."""
    for r in range(len(batch.inputs)):
        for segment in range(1, batch.segment_ids[r].max() + 1):
            where = batch.segment_ids[r] == segment
            assert batch.positions[r][where].tolist() == list(range(where.sum()))
            ids = [int(batch.inputs[r][where][0]), *batch.targets[r][where].tolist()]
            yield tuple(ids), tuple(batch.loss_mask[r][where].tolist()), int(batch.sources[r][where][0])


def test_every_example_as_often_as_the_others(config):
    found, _ = batches(config, 60)
    seen = Counter(example for batch in found for example in examples_of(batch))
    expected = set()
    for group, source in enumerate(open_sources(config.data.train)):
        examples, _ = encode_sources([source], Encoder(make_tokenizer()), 128)
        rows = [examples[i] for i in range(len(examples))]
        expected |= {(tuple(ids.tolist()), tuple(mask[1:].tolist()), group) for ids, mask in rows}
    assert set(seen) == expected
    assert max(seen.values()) - min(seen.values()) <= 8  # sequences stay open, so epochs overlap a little
    filled = np.mean([(batch.segment_ids > 0).mean() for batch in found])
    assert filled > 0.85


def test_from_any_position_on_and_on_any_mesh(config):
    found, states = batches(config, 12)
    json.dumps(states)
    again, _ = batches(config, 4, make_mesh(2, 1, 2, 1, jax.devices()[:4]), json.loads(json.dumps(states[7])))
    for one, other in zip(found[8:], again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_process_reads_only_what_its_rows_need(config, tmp_path, monkeypatch):
    """The first row of four and the others, as two processes have them: the same rows, and nothing is read by both."""
    write_jsonl(tmp_path / "many.jsonl", conversations(4000))
    data = dataclasses.replace(config.data, train=[SourceConfig(path=str(tmp_path / "many.jsonl"))])
    config = dataclasses.replace(config, data=data)
    whole, _ = batches(config, 12)
    original, read = Source.read, {}
    monkeypatch.setattr(streaming, "to_mesh", lambda batch, *_: batch)
    for rows in (slice(0, 1), slice(1, 4)):
        seen = read[rows.start] = set()
        monkeypatch.setattr(streaming, "local_sequences", lambda *_, rows=rows: rows)
        monkeypatch.setattr(
            Source, "read", lambda self, start, *rest, seen=seen: seen.add(start) or original(self, start, *rest)
        )
        found, states = batches(config, 12)
        for one, other in zip(found, whole, strict=True):
            jax.tree.map(lambda a, b, rows=rows: np.testing.assert_array_equal(a, b[rows]), one, other)
        assert set(states[-1]) == {str(row) for row in range(rows.start, rows.stop)}
    assert read[0]
    assert not read[0] & read[1]


def test_each_row_of_the_batches_has_the_mixture(config, tmp_path):
    """Two sources of one size, and an even number of rows."""
    given = [SourceConfig(path=str(write_jsonl(tmp_path / f"{i}.jsonl", conversations(200, seed=i)))) for i in range(2)]
    found, _ = batches(dataclasses.replace(config, data=dataclasses.replace(config.data, train=given)), 30)
    for row in range(4):
        seen = Counter(source for batch in found for r, source in sources_of(batch) if r == row)
        assert abs(seen[0] - seen[1]) <= 10  # of about 150


def sources_of(batch):
    for r in range(len(batch.inputs)):
        for segment in range(1, batch.segment_ids[r].max() + 1):
            yield r, int(batch.sources[r][batch.segment_ids[r] == segment][0])


def test_threads_share_a_parquet_file(config, tmp_path):
    rows = conversations(800)
    found = []
    write_jsonl(tmp_path / "rows.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=20)
    for name in ("rows.jsonl", "rows.parquet"):
        data = dataclasses.replace(config.data, train=[SourceConfig(path=str(tmp_path / name))])
        found.append(batches(dataclasses.replace(config, data=data), 30)[0])
    for one, other in zip(*found, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_row_of_the_batches_without_examples(config, tmp_path):
    """In the order of the file, every fourth conversation is too long."""
    rows = conversations(8)
    for row in rows[2::4]:
        row["messages"][-1]["content"] *= 60
    given = [SourceConfig(path=str(write_jsonl(tmp_path / "long.jsonl", rows)))]
    data = dataclasses.replace(config.data, train=given, shuffle=False)
    with pytest.raises(UserError, match=r"8 consecutive rows, up to .*, gave no examples for sequence 2 of the batch"):
        batches(dataclasses.replace(config, data=data), 1)
    found, _ = batches(dataclasses.replace(config, data=dataclasses.replace(data, shuffle=True)), 4)
    assert len(found) == 4


def test_a_position_of_an_older_version(config):
    with pytest.raises(UserError, match=r"an older version has written this run's position"):
        batches(config, 1, state={"parent": {}, "next_row": 0})


def test_one_example_a_row_in_order(config):
    data = dataclasses.replace(config.data, packing=False, shuffle=False, train=config.data.train[:1])
    found, _ = batches(dataclasses.replace(config, data=data), 10)
    assert all(batch.segment_ids.max() == 1 and batch.sources is None for batch in found)
    examples, _ = encode_sources(open_sources(data.train), Encoder(make_tokenizer()), 128)
    rows = [row[segment > 0] for batch in found for row, segment in zip(batch.targets, batch.segment_ids, strict=True)]
    for i, row in enumerate(rows):
        assert row.tolist() == examples[i][0][1:].tolist()


def test_a_run_and_its_continuation_are_the_undisturbed_run(config, tmp_path):
    def run(name, steps):
        training = dataclasses.replace(
            config.training, output_dir=str(tmp_path / name), max_steps=steps, save_every=4, tensorboard=True
        )
        train(dataclasses.replace(config, training=training), one_device())

    run("whole", 8)
    (tmp_path / "cut").mkdir()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert set(rows[0]["source_loss"]) == {source.path for source in config.data.train}
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "8")
    run("again", 8)
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    with (tmp_path / "b.jsonl").open("a") as file:  # the position is one in another order now
        file.write(json.dumps(conversations(1, seed=2)[0]) + "\n")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "8")
    with pytest.raises(UserError, match="the training data has changed"):
        run("again", 8)


def test_held_out_rows_have_the_lengths_that_were_checked(config, monkeypatch):
    """A stream has rows of one length, and so has its held-out loss, also without packing."""
    data = dataclasses.replace(config.data, packing=False, eval=config.data.train[:1])
    seen = []
    plan = due.plan_run

    def noting(*given, **options):
        seen.append(plan(*given, **options))
        return seen[-1]

    monkeypatch.setattr(due, "plan_run", noting)
    training = dataclasses.replace(config.training, max_steps=1, eval_every=1)
    train(dataclasses.replace(config, data=data, training=training), one_device())
    assert {int(length) for one in seen for length in one.lengths} == set(sequence_lengths(data)) == {128}


def test_a_row_with_nothing_to_train_on_is_refused_as_in_a_plan(config, tmp_path):
    rows = write_jsonl(tmp_path / "empty.jsonl", [{"input_ids": [4, 5], "labels": [4, -100]}])
    data = dataclasses.replace(config.data, train=[SourceConfig(path=str(rows))])
    with pytest.raises(UserError, match=r"empty.jsonl row 0: nothing to train on; every token is context"):
        batches(dataclasses.replace(config, data=data), 1)


def test_mistakes(config, tmp_path):
    with pytest.raises(UserError, match=r"training.max_steps: has to be set with data.streaming"):
        dataclasses.replace(config, training=dataclasses.replace(config.training, max_steps=None))
    rows = [*conversations(1200), {"messages": [{"role": "user", "content": "a"}]}]
    late = [SourceConfig(path=str(write_jsonl(tmp_path / "late.jsonl", rows)))]  # beyond the rows looked at before
    data = dataclasses.replace(config.data, train=late, shuffle=False)
    training = dataclasses.replace(config.training, max_steps=10_000, save_every=100_000, log_every=100)
    with pytest.raises(UserError, match=r"late.jsonl row 1200: no assistant message to train on"):
        train(dataclasses.replace(config, data=data, training=training), one_device())
