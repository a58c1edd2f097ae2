"""A run whose model, data, checkpoints and files are in a bucket; the bucket is served on this machine."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from fake_gcs import Bucket
from kit import run_config
from safetensors.numpy import load_file

from sft_jax.config import to_dict


@pytest.fixture(scope="module")
def bucket(tiny, chats):
    with Bucket() as bucket:
        for file in tiny.rglob("*"):
            if file.is_file():
                bucket.objects[f"model/{file.relative_to(tiny)}"] = (file.read_bytes(), 1)
        bucket.objects["chats.jsonl"] = (chats.read_bytes(), 1)
        yield bucket


def sft_jax(bucket, *arguments):
    import os

    environment = os.environ | bucket.environment() | {"XLA_FLAGS": "", "PYTHONWARNINGS": "default"}
    return subprocess.run(
        [sys.executable, "-m", "sft_jax", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip


def metrics(lines: str) -> list[dict]:
    rows = [json.loads(line) for line in lines.splitlines()]
    return [{key: row[key] for key in ("step", "loss", "grad_norm")} for row in rows if "loss" in row]


def test_everything_in_a_bucket(bucket, tiny, chats, tmp_path):
    """The same as on a disk, to the bit: started, continued, exported, and the weights read by ranges."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(to_dict(run_config(tiny, chats, "unset", training__save_every=2))))
    here = sft_jax(bucket, "train", config, f"training.output_dir={tmp_path / 'run'}")
    assert here.returncode == 0, here.stderr
    keys = ["model.path=gs://bucket/model", "training.output_dir=gs://bucket/runs/a"]
    data = "data.train=[{path: gs://bucket/chats.jsonl}]"
    bucket.requests.clear()
    there = sft_jax(bucket, "train", config, *keys, data)
    assert there.returncode == 0, there.stderr
    assert "gs://bucket/runs/a/report/loss.png" in there.stderr
    local = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert metrics(bucket.objects["runs/a/metrics.jsonl"][0].decode()) == metrics(local)
    names = {name.removeprefix("runs/a/") for name in bucket.objects if name.startswith("runs/a/")}
    assert {"config.yaml", "metrics.jsonl", "report/loss.png", "tokenizer/tokenizer.json"} <= names
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} >= {"4", "6"}
    weights = [line for line in bucket.requests if "model.safetensors" in line and "alt=media" in line]
    assert len(weights) > 10  # by ranges, and not the file at once

    again = sft_jax(bucket, "train", config, *keys, data)
    assert again.returncode == 0, again.stderr
    assert "at step 6 of 6" in again.stderr
    for run, out in (("gs://bucket/runs/a", tmp_path / "there"), (tmp_path / "run", tmp_path / "here")):
        done = sft_jax(bucket, "export", run, out, "--format", "merged")
        assert done.returncode == 0, done.stderr
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("there", "here"))
    assert all(np.array_equal(one[name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("model.path=gs://bucket/nothing", "model.path: gs://bucket/nothing has no config.json"),
        ("training.output_dir=gs://bucket/model", "gs://bucket/model holds something that is not a run"),
        ("training.output_dir=gx://bucket/run", "gx://bucket/run: not a kind of address that is known here"),
    ],
)
def test_mistakes(bucket, tiny, chats, tmp_path, key, said):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(to_dict(run_config(tiny, chats, tmp_path / "run"))))
    before = dict(bucket.objects)
    done = sft_jax(bucket, "train", config, key)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert bucket.objects == before
