"""Commands that are killed at any moment and run again end as undisturbed ones, bit for bit; nothing is left behind."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from kit import child_environment, config_of, trained_leaves, write_chats
from warm import Ended, Life, Warm

from sft_jax import config_file as configs

STEPS, EVERY = 48, 4
KEYS = ("loss", "grad_norm", "learning_rate", "real_tokens", "target_tokens", "eval_loss")

RUNS = {
    "lora": [],
    "full": ["lora=null", "optimizer.learning_rate=1e-3"],
    "dora": ["lora.method=dora"],
    "nf4": ["model.quantization=nf4"],
    "streaming": ["data.streaming=true"],
    "evaluated": ["training.eval_every=4", "training.keep_best=1", "evaluation.samples=[which river]"],
    "no token cache": [],
    "two processes": [],
}


class Runs:
    """Starts one command again and again in one folder."""

    def __init__(self, warm: Warm, folder: Path, config: Path, changes: list[str], num_processes: int = 1):
        self.warm, self.folder, self.config, self.changes = warm, folder, config, changes
        self.num_processes = num_processes
        self.cache: Path | None = None
        self.temporary = folder.with_name(f"{folder.name}-temporary")
        self.temporary.mkdir()

    def start(self) -> list[Life]:
        group = []
        if self.num_processes > 1:
            with socket.socket() as unused:
                unused.bind(("127.0.0.1", 0))
                port = unused.getsockname()[1]
            group = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", self.num_processes, "--process-id"]
        arguments = ["train", self.config, f"training.output_dir={self.folder}", *self.changes]
        ids = [[*group, i] if group else [] for i in range(self.num_processes)]
        environment = {"TMPDIR": str(self.temporary)} | ({"SFT_JAX_CACHE": str(self.cache)} if self.cache else {})
        return [self.warm.start(*arguments, *one, environment=environment) for one in ids]

    def live(self, seconds: float) -> tuple[bool, Ended]:
        """Start the command, and kill it after some seconds; returns whether that was before its end."""
        lives = self.start()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and lives[0].is_running(min(0.02, max(0, deadline - time.monotonic()))):
            pass
        was_running = lives[0].is_running()
        for life in lives if was_running else ():
            life.kill()
        first, *_ = [life.wait() for life in lives]
        return was_running, first

    def rows(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def last_step(self) -> int:
        return max((row["step"] for row in self.rows() if "loss" in row), default=0)


def names(folder: Path) -> list[str]:
    """What lies in a run directory, without the names that the checkpoint library chooses at random."""
    found = {str(one.relative_to(folder)) for one in folder.rglob("*") if "/d/" not in str(one)}
    return sorted(re.sub(r"events\.out\..*", "events", name) for name in found)


def assert_same_files(killed: Path, whole: Path) -> None:
    assert names(killed) == names(whole)
    for file in whole.iterdir():
        assert (killed / file.name).read_bytes() == file.read_bytes(), file.name


def assert_equal(whole: Runs, killed: Runs) -> None:
    rows = [[{key: row[key] for key in KEYS if key in row} for row in one.rows()] for one in (whole, killed)]
    assert rows[0] == rows[1]
    one, other = (trained_leaves(runs.folder, STEPS) for runs in (whole, killed))
    assert all(np.array_equal(one[path], other[path]) for path in one)
    assert names(whole.folder) == names(killed.folder)
    assert not list(killed.temporary.iterdir())
    if killed.cache:
        assert len(list((killed.cache / "tokens").iterdir())) == 1


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    with Warm(**child_environment(SFT_JAX_CACHE=str(tmp_path_factory.mktemp("cache")))) as warm:
        yield warm


@pytest.mark.drill("sft_jax/files", "sft_jax/run", "sft_jax/store", "sft_jax/data/batches", "sft_jax/data/tokens")
@pytest.mark.parametrize("kind", RUNS)
def test_killed_runs(kind, warm, tiny, tmp_path, is_full):
    quota = 50 if is_full else 1
    rng = np.random.default_rng(len(kind))
    chats = write_chats(tmp_path / "chats.jsonl", 400 if kind == "no token cache" else 40)
    config = tmp_path / "config.yaml"
    shape = {"training__max_steps": STEPS, "training__save_every": EVERY}
    configs.save(config_of(tiny, chats, tmp_path / "unset", **shape), config)
    changes = RUNS[kind] + ([f"data.eval=[{{path: {chats}, max_rows: 8}}]"] if kind == "evaluated" else [])
    count = 2 if kind == "two processes" else 1
    whole = Runs(warm, tmp_path / "whole", config, changes, count)
    began = time.monotonic()
    done, ended = whole.live(120)
    seconds = time.monotonic() - began
    assert not done, ended
    assert ended.code == 0, ended.err

    kills, most, attempt = 0, 0, 0
    while kills < quota:
        attempt += 1
        killed = Runs(warm, tmp_path / f"killed-{attempt}", config, changes, count)
        while True:
            before = killed.last_step()
            if kind == "no token cache":
                cache = killed.cache = tmp_path / "cache"
                for made in [] if ended.code == -9 else cache.glob("tokens/*"):
                    shutil.rmtree(made)
            was_killed, ended = killed.live(rng.uniform(0, seconds) if kills < quota else 120)
            kills += was_killed
            if resumed := re.search(r"resume  at step (\d+) of", ended.err):
                most = max(most, before - int(resumed[1]))
            elif "restart" in ended.err:
                most = max(most, before)
            if not was_killed:
                break
        assert ended.code == 0, ended.err
        assert_equal(whole, killed)
        shutil.rmtree(killed.folder)
    print(f"{kind}: {kills} kills, {attempt} runs, at most {most} steps repeated (save_every is {EVERY})")
    assert most <= 2 * EVERY


@pytest.mark.drill("sft_jax/files", "sft_jax/run", "sft_jax/store", "sft_jax/data/batches", "sft_jax/data/tokens")
@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_killed_exports(form, warm, tiny, chats, tmp_path, is_full):
    quota = 50 if is_full else 1
    rng = np.random.default_rng(len(form))
    config = tmp_path / "config.yaml"
    configs.save(config_of(tiny, chats, tmp_path / "run", training__max_steps=2), config)
    assert warm.run("train", config).code == 0
    # Both of one name, because the card names the folder.
    whole, killed = tmp_path / "whole" / "model", tmp_path / "killed" / "model"
    whole.parent.mkdir()
    killed.parent.mkdir()
    began = time.monotonic()
    ended = warm.run("export", tmp_path / "run", whole, "--format", form)
    seconds = time.monotonic() - began
    assert ended.code == 0, ended.err
    kills = 0
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    while kills < quota:
        life = warm.start("export", tmp_path / "run", killed, "--format", form, environment={"TMPDIR": str(temporary)})
        time.sleep(rng.uniform(0.3, 1) * seconds)
        life.kill()
        kills += life.wait().code == -9
        if killed.exists():
            assert_same_files(killed, whole)
            shutil.rmtree(killed)
    assert warm.run("export", tmp_path / "run", killed, "--format", form).code == 0
    assert_same_files(killed, whole)
    assert names(killed.parent) == names(whole.parent)
    assert not list(temporary.iterdir())
    print(f"{form}: {kills} kills")
