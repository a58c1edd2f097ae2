"""A run whose model, data, checkpoints and files are in a bucket, which is served on this machine."""

import json
import re

import numpy as np
import pytest
import yaml
from fake_gcs import Bucket
from kit import Child, Group, run_config
from safetensors.numpy import load, load_file

from sft_jax.config_file import to_dict


@pytest.fixture(scope="module")
def bucket(tiny, chats):
    with Bucket() as bucket:
        for file in tiny.rglob("*"):
            if file.is_file():
                bucket.objects[f"model/{file.relative_to(tiny)}"] = (file.read_bytes(), 1)
        bucket.objects["chats.jsonl"] = (chats.read_bytes(), 1)
        yield bucket


@pytest.fixture(scope="module")
def sft_jax(bucket):
    """Commands in a process that is configured for the bucket."""
    child = Child(**bucket.environment())
    yield child
    child.close()


def metrics(lines: str) -> list[dict]:
    rows = [json.loads(line) for line in lines.splitlines()]
    return [{key: row[key] for key in ("step", "loss", "grad_norm")} for row in rows if "loss" in row]


@pytest.mark.long
def test_everything_in_a_bucket(bucket, sft_jax, tiny, chats, tmp_path, monkeypatch):
    """Training, resuming and exporting give the same bits as on a disk, and weights are read by ranges."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(to_dict(run_config(tiny, chats, "unset", training__save_every=2))))
    here = sft_jax("train", config, f"training.output_dir={tmp_path / 'run'}")
    assert here.returncode == 0, here.stderr
    keys = ["model.path=gs://bucket/model", "training.output_dir=gs://bucket/runs/a"]
    data = "data.train=[{path: gs://bucket/chats.jsonl}]"
    bucket.requests.clear()
    there = sft_jax("train", config, *keys, data)
    assert there.returncode == 0, there.stderr
    assert "gs://bucket/runs/a/report/loss.png" in there.stderr
    local = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert metrics(bucket.objects["runs/a/metrics.jsonl"][0].decode()) == metrics(local)
    names = {name.removeprefix("runs/a/") for name in bucket.objects if name.startswith("runs/a/")}
    assert {"config.yaml", "metrics.jsonl", "report/loss.png", "tokenizer/tokenizer.json"} <= names
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} >= {"4", "6"}
    weights = [line for line in bucket.requests if "model.safetensors" in line and "alt=media" in line]
    assert len(weights) > 10  # several ranges instead of the whole file

    again = sft_jax("train", config, *keys, data)
    assert again.returncode == 0, again.stderr
    assert "at step 6 of 6" in again.stderr
    for run, out in (("gs://bucket/runs/a", tmp_path / "there"), (tmp_path / "run", tmp_path / "here")):
        done = sft_jax("export", run, out, "--format", "merged")
        assert done.returncode == 0, done.stderr
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("there", "here"))
    assert all(np.array_equal(one[name], tensor) for name, tensor in other.items())

    adapter = sft_jax("export", "gs://bucket/runs/a", tmp_path / "adapter")
    assert adapter.returncode == 0, adapter.stderr
    assert "its base model is gs://bucket/model, which PEFT cannot open" in adapter.stdout

    export_into_the_bucket(bucket, sft_jax, tmp_path / "here", monkeypatch)


def export_into_the_bucket(bucket, sft_jax, here, monkeypatch):
    """Exports write the same files as on a disk, and two processes write the same tensors; config.json comes last."""
    run, out = "gs://bucket/runs/a", "gs://bucket/out/one"
    done = sft_jax("export", run, out, "--format", "merged")
    assert done.returncode == 0, done.stderr
    assert "gs://bucket/out/one: merged of step 6" in done.stdout
    there = {name.removeprefix("out/one/"): body for name, (body, _) in bucket.objects.items() if "out/one/" in name}
    assert there.keys() == {file.name for file in here.iterdir()}
    for name in there.keys() - {"README.md"}:
        assert there[name] == (here / name).read_bytes(), name
    assert list(bucket.objects)[-1] == "out/one/config.json"
    bucket.objects["out/two/export.unfinished"] = (b"", 1)  # left by an interrupted export
    bucket.objects["out/two/model-00001-of-00009.safetensors"] = (b"half", 1)
    again = sft_jax("export", run, out)
    assert (again.returncode, "out/one: already exists" in again.stderr) == (2, True)

    for name, value in bucket.environment().items():
        monkeypatch.setenv(name, value)
    group = Group(2, "export", run, "gs://bucket/out/two", "--format", "merged")
    assert group.wait() == [0, 0], group.stderr
    assert list(bucket.objects)[-1] == "out/two/config.json"
    assert "out/two/export.unfinished" not in bucket.objects
    shards = [load(body) for name, (body, _) in bucket.objects.items() if re.match("out/two/.*safetensors$", name)]
    assert len(shards) >= 2  # files of each process
    one = load(there["model.safetensors"])
    two = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert sum(map(len, shards)) == len(two)
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    written = sft_jax("generate", "gs://bucket/out/two", "--prompt", "river bread", "--max-new-tokens", 4)
    assert written.returncode == 0, written.stderr


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.path=gs://bucket/nothing", "model.path: gs://bucket/nothing has no config.json"),
        ("training.output_dir=gs://bucket/model", "gs://bucket/model holds files that are not a run"),
        ("training.output_dir=gx://bucket/run", "gx://bucket/run: unknown URL protocol"),
    ],
)
def test_user_errors(bucket, sft_jax, tiny, chats, tmp_path, key, message):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(to_dict(run_config(tiny, chats, tmp_path / "run"))))
    before = dict(bucket.objects)
    done = sft_jax("train", config, key)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert bucket.objects == before
