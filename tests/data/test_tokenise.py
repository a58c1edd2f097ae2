"""Tokenising: the same in one process and in several, kept and found again, safe when broken off or started twice."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from kit import CHATML, CHATML_UNMARKED, conversations, make_tokenizer, write_jsonl

from sft_jax.config import SourceConfig
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.sources import open_sources
from sft_jax.data.tokens import workers
from sft_jax.data.tokens.examples import encode_sources
from sft_jax.data.tokens.tokenise import tokenise
from sft_jax.data.tokens.tokenised import FILES
from sft_jax.errors import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def path(tmp_path):
    rows = conversations(200)
    rows[7]["messages"][-1]["weight"] = 0.25
    rows[150]["messages"][-1]["weight"] = 0.75
    rows[40]["messages"][-1]["weight"] = 0.125  # after a heavier one of the same worker
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def opened(path, **options):
    (source,) = open_sources([SourceConfig(path=str(path), **options)])
    return source


def same(a, b):
    for name in ("ids", "codes", "lengths", "rows", "targets"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert a.weights.tolist() == b.weights.tolist()
    assert (a.num_rows, a.num_refused, a.refused, a.tally) == (b.num_rows, b.num_refused, b.refused, b.tally)
    assert a.digest == b.digest


@pytest.mark.smoke
def test_processes_give_what_one_gives(path):
    path.write_bytes(path.read_bytes() + b"{broken\n")
    encoder = Encoder(make_tokenizer(), stop_ids=(2,))
    done: list[int] = []
    one, origin = tokenise(opened(path), encoder, 1)
    several, several_origin = tokenise(opened(path), encoder, 3, progress=done.append)
    same(one, several)
    assert (origin.num_workers, several_origin.num_workers) == (1, 3)
    assert sum(done) == one.num_rows == 201
    assert one.num_refused == 1
    assert one.weights.tolist() == [0.0, 1.0, 0.25, 0.125, 0.75]  # as they come, however the rows are cut
    assert set(np.unique(one.codes)) == {0, 1, 2, 3, 4}


def test_the_second_start_reads_what_the_first_kept(path, cache, monkeypatch):
    encoder = Encoder(make_tokenizer())
    first, origin = tokenise(opened(path), encoder, cache=True)
    assert not origin.cached
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", lambda *_: pytest.fail("tokenised again"))
        second, origin = tokenise(opened(path), encoder, cache=True)
    assert origin.cached
    same(first, second)
    assert len(list(cache.iterdir())) == 1


def test_what_a_result_depends_on(path, cache, tmp_path):
    tokenizer = make_tokenizer()

    def kept() -> int:
        return len(list(cache.iterdir()))

    tokenise(opened(path), Encoder(tokenizer), cache=True)
    other_name = tmp_path / "other.jsonl"
    other_name.write_bytes(path.read_bytes())
    tokenise(opened(other_name), Encoder(tokenizer), cache=True)
    assert kept() == 1  # the same rows by another name
    tokenise(opened(path), Encoder(tokenizer, "last_assistant"), cache=True)
    tokenise(opened(path), Encoder(tokenizer, stop_ids=(3,)), cache=True)
    tokenise(opened(path, max_rows=10), Encoder(tokenizer), cache=True)
    assert kept() == 4
    try:
        tokenizer.chat_template = CHATML_UNMARKED
        tokenise(opened(path), Encoder(tokenizer), cache=True)
    finally:
        tokenizer.chat_template = CHATML
    assert kept() == 5
    other_name.write_bytes(path.read_bytes().replace(b"river", b"rivet"))
    tokenise(opened(other_name), Encoder(tokenizer), cache=True)
    assert kept() == 6


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_or_half_written_result_is_made_anew(path, cache, capsys):
    encoder = Encoder(make_tokenizer())
    first, _ = tokenise(opened(path), encoder)
    tokenise(opened(path), encoder, cache=True)
    (folder,) = cache.iterdir()
    for damage in (
        lambda: (folder / "ids.bin").write_bytes((folder / "ids.bin").read_bytes()[:-4]),
        lambda: (folder / "meta.json").unlink(),
        lambda: (folder / "meta.json").write_text("{"),
        *(lambda name=name: flip(folder / name) for name in FILES),
    ):
        damage()
        again, origin = tokenise(opened(path), encoder, cache=True)
        assert not origin.cached
        assert "the cached tokens are damaged and are made again" in capsys.readouterr().err
        same(first, again)
    assert [one.name for one in cache.iterdir()] == [folder.name]


def test_a_start_that_is_broken_off_leaves_nothing(path, cache, monkeypatch):
    encoder = Encoder(make_tokenizer())
    monkeypatch.setattr(workers, "_BATCH", 50)

    def interrupt(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenise(opened(path), encoder, cache=True, progress=interrupt)
    assert list(cache.iterdir()) == []


def test_refused_rows_are_not_kept_when_the_rest_is_not_read(path, cache, monkeypatch):
    monkeypatch.setattr(workers, "_BATCH", 50)
    path.write_bytes(b"{broken\n" + path.read_bytes())
    found, _ = tokenise(opened(path, format="messages"), Encoder(make_tokenizer()), cache=True, stop_at_refusal=True)
    assert found.num_rows == 50
    assert list(cache.iterdir()) == []


def test_two_starts_at_once(path, cache):
    results = []

    def start():
        results.append(tokenise(opened(path), Encoder(make_tokenizer()), cache=True)[0])

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for one in results[1:]:
        same(results[0], one)
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written(path, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFT_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"the cache cannot be written .*SFT_JAX_CACHE, or set data.cache=false"):
        tokenise(opened(path), Encoder(make_tokenizer()), cache=True)


def test_processes_work_from_a_script_without_a_main_guard(path, tmp_path):
    """Workers are commands of their own: they do not run the script that calls train once more."""
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    script = tmp_path / "script.py"
    script.write_text(
        "from transformers import AutoTokenizer\n"
        "from sft_jax.config import SourceConfig\n"
        "from sft_jax.data.chat.encoder import Encoder\n"
        "from sft_jax.data.tokens.examples import encode_sources\n"
        "from sft_jax.data.read.sources import open_sources\n"
        f"encoder = Encoder(AutoTokenizer.from_pretrained({str(tmp_path / 'tokenizer')!r}))\n"
        f"sources = open_sources([SourceConfig(path={str(path)!r})])\n"
        "examples, _ = encode_sources(sources, encoder, 128, num_workers=2)\n"
        "print(len(examples), examples.fingerprint())\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    examples, _ = encode_sources([opened(path)], Encoder(make_tokenizer()), 128)
    assert done.stdout.split() == [str(len(examples)), examples.fingerprint()]


def test_a_mistake_in_a_worker_is_one_line(path):
    tokenizer = make_tokenizer()
    try:
        tokenizer.chat_template = None
        with pytest.raises(UserError, match=r"^data.chat_template: the tokenizer has no chat template"):
            tokenise(opened(path), Encoder(tokenizer), 2)
    finally:
        tokenizer.chat_template = CHATML


@pytest.mark.parametrize("num_workers", [1, 2])
def test_too_many_loss_weights(tmp_path, num_workers):
    one = [{"role": "user", "content": "river"}, {"role": "assistant", "content": "bridge"}]
    lines = [{"messages": [one[0], one[1] | {"weight": 0.5 + i / 1000}]} for i in range(300)]
    path = write_jsonl(tmp_path / "rewards.jsonl", lines)
    message = r"rewards\.jsonl: its rows have more than 254 different loss weights besides 0 and 1"
    with pytest.raises(UserError, match=message):
        tokenise(opened(path), Encoder(make_tokenizer()), cache=False, num_workers=num_workers)


def test_several_sources_keep_their_rows_apart(tmp_path):
    for name, seed in (("a.jsonl", 1), ("b.jsonl", 2)):
        write_jsonl(tmp_path / name, conversations(9, seed))
    sources = open_sources([SourceConfig(path=str(tmp_path), weight=0.5, max_rows=5)])
    examples, report = encode_sources(sources, Encoder(make_tokenizer()), 128)
    assert [examples.describe(i) for i in (0, 5, 9)] == [
        f"{tmp_path / name} row {row}" for name, row in (("a.jsonl", 0), ("b.jsonl", 0), ("b.jsonl", 4))
    ]
    assert examples.weights == (0.5, 0.5)
    assert [(one.rows, one.kept) for one in report.sources] == [(5, 5), (5, 5)]
    ids, masks = examples.flat()
    assert len(ids) == len(masks) == examples.lengths.sum()
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert lines[4]["messages"][-1]["content"] in make_tokenizer().decode(examples[9][0])
