"""What the loggers write, read with the readers of their own clients; failures of a client do not end the run."""

import json
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from kit import Child, conversations, one_device, run_config, write_jsonl

from sft_jax import config_file as configs
from sft_jax.config import EvaluationConfig, SourceConfig
from sft_jax.errors import UserError
from sft_jax.redaction import values_without_secrets
from sft_jax.run.recorder import peak_memory
from sft_jax.run.train import train
from sft_jax.store.loggers.background import Background
from sft_jax.store.loggers.logger import Logger
from sft_jax.store.loggers.mlflow_run import key_of, value_of
from sft_jax.store.loggers.tags import tagged
from sft_jax.store.metrics import read_metrics

SECRET = "hf_" + "aB3" * 10
HIDDEN = "very-secret-value"  # of an environment variable
TAGS = {
    "train/loss",
    "train/grad_norm",
    "speed/tokens_per_second",
    "tokens/target_tokens",
    "source/b.jsonl/loss",
    "eval/loss",
}


def values(rows: list[tuple[int, dict]]) -> dict[str, dict[int, float]]:
    """Values by tag and step, the last of each step."""
    found: dict[str, dict[int, float]] = {}
    for step, row in rows:
        for tag, value in row.items():
            found.setdefault(tag, {})[step] = value
    return found


def of_tensorboard(folder) -> tuple[dict[str, dict[int, float]], dict[str, bytes]]:
    """The scalars, and the texts and images, of event files."""
    from tensorboardX.proto.event_pb2 import Event

    rows, others = [], {}
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    rows.append((event.step, {value.tag: value.simple_value}))
                else:
                    others[value.tag] = value.SerializeToString()
    return values(rows), others


@pytest.fixture(scope="module")
def logged(tiny, tmp_path_factory):
    """A run with all loggers, which was interrupted after step 6 and resumed from step 3."""
    folder = tmp_path_factory.mktemp("logged")
    sources = [
        SourceConfig(path=str(write_jsonl(folder / name, conversations(20, i))))
        for i, name in enumerate(["a.jsonl", "b.jsonl"])
    ]
    config = run_config(
        tiny, sources[0].path, folder / "run", training__max_steps=6, training__save_every=3, training__eval_every=3,
        training__tensorboard=True, training__wandb_project="trial", training__mlflow_experiment="trial",
        training__trackio_project="trial", training__run_name="a name", data__train=sources, data__eval=sources[:1],
        evaluation=EvaluationConfig(samples=["Which river?", HIDDEN], samples_every=3, max_new_tokens=4),
    )  # fmt: skip
    (folder / "config.yaml").write_text(configs.to_yaml(config))
    environment = {
        "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "TRACKIO_DIR": str(folder / "trackio"),
        "HOME": str(folder),
        "DEMO_TOKEN": HIDDEN, "MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true",
    }  # fmt: skip
    child = Child(**environment)
    try:
        first = child("train", folder / "config.yaml")
        assert first.returncode == 0, first.stderr
        before = json.loads((folder / "run" / "loggers.json").read_text())
        shutil.rmtree(folder / "run" / "checkpoints" / "6")
        second = child("train", folder / "config.yaml")
        assert second.returncode == 0, second.stderr
    finally:
        child.close()
    assert "metrics.jsonl is complete" not in first.stderr + second.stderr
    assert "Trackio" not in first.stdout + second.stdout
    assert json.loads((folder / "run" / "loggers.json").read_text()) == before
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    expected = values([(row["step"], tagged({k: v for k, v in row.items() if k != "samples"})) for row in rows])
    names = {tag.replace(f"{str(folder).strip('/')}/", "") for tag in expected}
    assert names >= TAGS
    return folder, expected, environment, before


def test_metrics_jsonl_has_each_step_once(logged):
    folder, *_ = logged
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "samples" in row] == [0, 3, 6]


def test_tensorboard(logged):
    folder, expected, *_ = logged
    scalars, others = of_tensorboard(folder / "run" / "tensorboard")
    assert scalars.keys() == expected.keys()
    for tag, by_step in expected.items():
        assert scalars[tag] == pytest.approx(by_step, rel=1e-6), tag
    assert b"Which river?" in others["samples/0/text_summary"]
    assert b"max_steps" in others["config/text_summary"]
    assert b"\x89PNG" in others["loss"]


def test_weights_and_biases(logged):
    folder, expected, environment, identities = logged
    runs = sorted((folder / "run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert {one.name.rpartition("-")[2] for one in runs} == {identities["wandb"]["id"]}
    rows = []
    for run in runs:
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", run],
            capture_output=True, text=True, env=environment | {"PATH": "/usr/bin:/bin"}, check=True,
        )  # fmt: skip
        assert HIDDEN not in done.stdout
        records = [json.loads(line) for line in done.stdout.splitlines()]
        (begin,) = [record["run"] for record in records if record["type"] == "run"]
        assert (begin["project"], begin["display_name"]) == ("trial", "a name")
        assert begin["config"]["update"]["training"]["max_steps"] == 6
        assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [0]
        rows += [record["history"]["item"] for record in records if record["type"] == "history"]
    found = values([(row["step"], {key: row[key] for key in row.keys() & expected.keys()}) for row in rows])
    assert found == expected
    assert {row["step"]: row["samples.nrows"] for row in rows if "samples.nrows" in row} == {0: 2, 3: 2, 6: 2}
    tables = [json.loads(file.read_text()) for file in sorted(runs[0].glob("files/media/table/*.json"))]
    assert {tuple(row[:2]) for table in tables for row in table["data"]} >= {(3, "Which river?"), (3, "[redacted]")}
    assert list(runs[1].glob("files/media/images/loss_*.png"))


def test_mlflow(logged, tmp_path, monkeypatch):
    _, expected, environment, identities = logged
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=environment["MLFLOW_TRACKING_URI"])
    (run,) = client.search_runs([client.get_experiment_by_name("trial").experiment_id])
    assert run.info.run_id == identities["mlflow"]["id"]
    assert run.info.run_name == "a name"
    assert run.info.status == "FINISHED"
    assert run.data.params["training.max_steps"] == "6"
    assert run.data.params["evaluation.samples"] == '["Which river?", "[redacted]"]'
    assert run.data.metrics.keys() == {key_of(tag) for tag in expected}
    for tag, by_step in expected.items():
        history = {one.step: one.value for one in client.get_metric_history(run.info.run_id, key_of(tag))}
        assert history == by_step
    assert {one.path for one in client.list_artifacts(run.info.run_id)} == {"config.json", "samples.json", "report"}
    file = client.download_artifacts(run.info.run_id, "samples.json", str(tmp_path))
    table = json.loads(Path(file).read_text())
    assert table["columns"] == ["step", "prompt", "text", "finish_reason"]
    assert {tuple(row[:2]) for row in table["data"]} == {
        (step, prompt) for step in (0, 3, 6) for prompt in ("Which river?", "[redacted]")
    }


def test_trackio(logged):
    _, expected, environment, identities = logged
    program = """
import json, sys, trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("trial")
print(json.dumps([run.name, run.config, SQLiteStorage.get_logs("trial", run.name)]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    name, config, rows = json.loads(done.stdout)
    assert name == identities["trackio"]["id"] == "a name"
    assert config["training"]["max_steps"] == 6
    assert HIDDEN not in done.stdout
    found = values([(row["step"], {k: v for k, v in row.items() if k in expected}) for row in rows])
    assert found == expected
    tables = [row for row in rows if "samples" in row]
    assert {row["step"] for row in tables} == {0, 3, 6}
    assert tables[0]["samples"]["_value"][0]["prompt"] == "Which river?"
    assert any("loss" in row for row in rows if row["step"] == 6)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("key", "package", "install"),
    [
        ("wandb_project", "wandb", "wandb"),
        ("mlflow_experiment", "mlflow", "mlflow-skinny"),
        ("trackio_project", "trackio", "trackio"),
    ],
)
def test_a_missing_package_is_reported_before_anything_is_read(tmp_path, monkeypatch, key, package, install):
    monkeypatch.setitem(sys.modules, package, None)
    config = run_config(tmp_path / "no-model", "no-data", tmp_path / "run", **{f"training__{key}": "trial"})
    with pytest.raises(UserError, match=rf"training\.{key}: .*pip install {install}\)"):
        train(config, one_device())
    assert not (tmp_path / "run").exists()


class Broken(Logger):
    """Fails at its second call."""

    def __init__(self):
        self.calls = []

    def scalars(self, step, values):
        self.calls.append(step)
        if len(self.calls) == 2:
            raise ConnectionError(f"no route to host,\nwith {SECRET}")


@pytest.mark.smoke
def test_a_failure_is_said_once_and_the_logger_stays_off():
    said, broken = [], Broken()
    logger = Background(broken, "service", said.append)
    for step in range(5):
        logger.scalars(step, {})
    logger.close()
    assert broken.calls == [0, 1]
    assert said == [
        "service: ConnectionError: no route to host, with [redacted]; it gets nothing more from this run, "
        "metrics.jsonl is complete"
    ]


class Slow(Logger):
    """Does not come back before it is let go."""

    def __init__(self):
        self.go, self.steps = threading.Event(), []

    def scalars(self, step, values):
        self.go.wait()
        self.steps.append(step)


@pytest.mark.smoke
def test_nobody_waits_for_a_slow_service():
    said, slow = [], Slow()
    logger = Background(slow, "service", said.append, wait=0.01)
    logger.scalars(1, {})
    logger.close()
    assert slow.steps == []
    assert said == ["service: still busy after 0.01 s and left alone; metrics.jsonl is complete"]
    slow.go.set()


def test_a_client_that_fails_in_the_middle(tiny, chats, tmp_path, monkeypatch, capsys):
    """The folder of MLflow goes away after two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = run_config(tiny, chats, tmp_path / "run", training__mlflow_experiment="trial")

    def remove(kind, step, metrics):
        if (kind, step) == ("step", 2):
            (tmp_path / "mlruns").rename(tmp_path / "gone")

    train(config, one_device(), callbacks=[remove])
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 6
    lines = [line for line in capsys.readouterr().err.splitlines() if "metrics.jsonl is complete" in line]
    assert len(lines) == 1
    assert lines[0].startswith("mlflow: ")


def test_a_service_that_cannot_be_opened_is_refused_by_a_new_run_only(tiny, chats, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "unknown://nowhere")
    changes = {"training__mlflow_experiment": "trial", "training__save_every": 3}
    with pytest.raises(UserError, match=r"training\.mlflow_experiment: mlflow cannot be opened: .*; mend this, or set"):
        train(run_config(tiny, chats, tmp_path / "run", **changes), one_device())
    train(run_config(tiny, chats, tmp_path / "run", training__save_every=3), one_device())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    capsys.readouterr()
    train(run_config(tiny, chats, tmp_path / "run", **changes), one_device())
    assert "it gets nothing from here on, metrics.jsonl is complete" in capsys.readouterr().err


@pytest.mark.smoke
def test_peak_memory_has_a_group_of_its_own():
    device = SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 1, "peak_bytes_in_use": 2})
    assert tagged({"step": 1, **peak_memory(device)}) == {"memory/peak_bytes": 2}
    assert peak_memory(SimpleNamespace(memory_stats=lambda: None)) == {}


@pytest.mark.smoke
def test_names_and_values_fit_into_mlflow():
    long = "source/" + "folder/" * 60 + "a.jsonl/loss"
    assert len(key_of(long)) == 250
    assert key_of(long).endswith("folder/a.jsonl/loss")
    assert key_of(long) != key_of(f"source/x{long[7:]}")
    assert value_of([1, "é"]) == '[1, "é"]'
    assert value_of("x" * 501).endswith("x… (501 characters)")
    assert len(value_of("x" * 501)) == 500


@pytest.mark.smoke
def test_secrets_are_redacted_in_nested_values():
    assert values_without_secrets({"a": [{"b": f"x {SECRET}"}, 1, None]}) == {"a": [{"b": "x [redacted]"}, 1, None]}
