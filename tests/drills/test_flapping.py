"""A bucket that delays, fails, cuts connections and lists late: a run in it ends as on a disk, also if it is killed."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from fake_gcs import Bucket, Faults
from kit import child_environment, config_of
from safetensors.numpy import load_file
from warm import Warm

from sft_jax import config_file as configs

STEPS, EVERY = 24, 4
KINDS = {
    "slow": Faults(delay=0.05),
    "errors": Faults(errors=0.15, delay=0.01),
    "cuts": Faults(cuts=0.08, delay=0.01),
    "late listings": Faults(stale=0.5),
    "all": Faults(errors=0.1, cuts=0.05, delay=0.03, stale=0.5),
}


def rows(text: str) -> list[dict]:
    keys = ("step", "loss", "grad_norm")
    return [{key: row[key] for key in keys} for row in map(json.loads, text.splitlines()) if "loss" in row]


def fill(bucket: Bucket, tiny: Path, chats: Path) -> None:
    for file in tiny.rglob("*"):
        if file.is_file():
            bucket.objects[f"model/{file.relative_to(tiny)}"] = (file.read_bytes(), 1)
    bucket.objects["chats.jsonl"] = (chats.read_bytes(), 1)


@pytest.mark.drill("sft_jax/files", "sft_jax/store", "sft_jax/run")
def test_flapping_bucket(tiny, chats, tmp_path, is_full):
    for kind in KINDS if is_full else ["cuts"]:
        (folder := tmp_path / kind).mkdir()
        run_in_bucket(kind, tiny, chats, folder, 4 if is_full else 1)


def run_in_bucket(kind, tiny, chats, tmp_path, num_kills):
    config = tmp_path / "config.yaml"
    keys = {"training__max_steps": STEPS, "training__save_every": EVERY}
    configs.save(config_of(tiny, chats, tmp_path / "run", **keys), config)
    rng = np.random.default_rng(len(kind))
    with Bucket() as bucket, Warm(**child_environment(**bucket.environment())) as warm:
        assert warm.run("train", config).code == 0
        fill(bucket, tiny, chats)
        arguments = ["model.path=gs://bucket/model", "training.output_dir=gs://bucket/runs/a"]
        arguments = ["train", config, *arguments, "data.train=[{path: gs://bucket/chats.jsonl}]"]
        began = time.monotonic()
        bucket.faults = KINDS[kind]
        killed = 0
        while True:
            life = warm.start(*arguments)
            if killed < num_kills and life.is_running(0):
                end = time.monotonic() + rng.uniform(2, 12)
                while time.monotonic() < end and life.is_running(0.1):
                    pass
                life.kill(signal.SIGKILL)
            ended = life.wait(400)
            if ended.code != -signal.SIGKILL:
                break
            killed += 1
        seconds = time.monotonic() - began
        assert ended.is_clean, ended.err
        assert ended.code == 0, ended.err
        bucket.faults = Faults()
        text = bucket.objects["runs/a/metrics.jsonl"][0].decode()
        assert rows(text) == rows((tmp_path / "run" / "metrics.jsonl").read_text())
        for run, out in (("gs://bucket/runs/a", "there"), (tmp_path / "run", "here")):
            ended = warm.run("export", run, tmp_path / out, "--format", "merged")
            assert ended.code == 0, ended.err
        there, here = (load_file(tmp_path / name / "model.safetensors") for name in ("there", "here"))
        assert all(np.array_equal(there[name], tensor) for name, tensor in here.items())
        assert not [name for name in bucket.objects if name.endswith((".lease", "export.unfinished"))]
    print(f"{kind}: {killed} kills, faults {dict(bucket.injected)}, {seconds:.0f} s")


@pytest.mark.drill("sft_jax/files", "sft_jax/store", "sft_jax/run")
def test_a_bucket_that_is_down_is_one_line(tiny, chats, tmp_path):
    """After the retries of the storage packages, which take about a minute."""
    config = tmp_path / "config.yaml"
    configs.save(config_of(tiny, chats, tmp_path / "run"), config)
    with Bucket() as bucket, Warm(**child_environment(**bucket.environment())) as warm:
        fill(bucket, tiny, chats)
        bucket.faults = Faults(errors=1.0)
        ended = warm.run("train", config, "training.output_dir=gs://bucket/runs/a", timeout=400)
    assert ended.is_clean, ended.err
    assert ended.code == 2
    assert "gs://bucket/runs/a: cannot be read" in ended.err
    print(ended.err)
