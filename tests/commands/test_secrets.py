"""Tokens and passwords do not get into files or messages."""

import json

import pytest
import yaml
from kit import run_config, sft_jax

from sft_jax import config_file
from sft_jax.redaction import has_secret, without_secrets

SECRET = "very-secret-value"
FORMS = [
    "hf_" + "aB3" * 10,
    "ghp_" + "aB3" * 12,
    "github_pat_" + "a_3" * 12,
    "AKIA" + "ABCD" * 4,
    "AIza" + "aB_" * 12,
    "sk-" + "aB-" * 10,
    "https://me:hunter2@host/data.jsonl",
    "Authorization: Bearer abcdefghijklmnop",
    "https://host/data.jsonl?X-Goog-Signature=abc123",
]


@pytest.mark.smoke
@pytest.mark.parametrize("text", FORMS)
def test_known_forms_are_redacted(text):
    assert has_secret(text)
    assert "[redacted]" in without_secrets(f"before {text} after")
    for part in ("hunter2", "aB3aB3", "abcdefghijklmnop", "abc123", "ABCDABCD"):
        assert part not in without_secrets(text)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "text", ["hf_model", "https://host:443/a@b", "task-one-two-three-four-five", "hf://datasets/a"]
)
def test_other_texts_stay(text):
    assert without_secrets(text) == text


@pytest.fixture
def with_reference(tiny, chats, tmp_path, monkeypatch):
    """A config whose data lie in a folder with the secret as its name."""
    monkeypatch.setenv("DATA_TOKEN", SECRET)
    folder = tmp_path / SECRET
    folder.mkdir()
    (folder / "a.jsonl").write_text(chats.read_text())
    (folder / "b.jsonl").write_text(chats.read_text())
    config = config_file.to_dict(run_config(tiny, chats, tmp_path / "run"))
    config["data"]["train"] = [{"path": f"{tmp_path}/${{oc.env:DATA_TOKEN}}/{name}.jsonl"} for name in "ab"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_a_reference_is_used_and_never_written(with_reference):
    folder = with_reference
    done = sft_jax("train", folder / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    files = [one for one in (folder / "run").rglob("*") if one.is_file()]
    assert any("${oc.env:DATA_TOKEN}" in one.read_text() for one in files if one.name == "config.yaml")
    for file in files:
        assert SECRET.encode() not in file.read_bytes(), file
    row = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert "${oc.env:DATA_TOKEN}/a.jsonl" in next(iter(row["source_loss"]))
    again = sft_jax("train", folder / "config.yaml")
    assert again.returncode == 0, again.stderr
    exported = sft_jax("export", folder / "run", folder / "out")
    assert exported.returncode == 0, exported.stderr


def test_errors_do_not_show_it(with_reference, monkeypatch):
    folder = with_reference
    (folder / SECRET / "a.jsonl").write_text("not json\n")
    done = sft_jax("train", folder / "config.yaml")
    assert done.returncode == 2
    assert "[redacted]/a.jsonl" in done.stderr
    assert SECRET not in done.stderr
    monkeypatch.delenv("DATA_TOKEN")
    done = sft_jax("train", folder / "config.yaml")
    assert done.returncode == 2
    assert "the environment variable 'DATA_TOKEN' is not set" in done.stderr


@pytest.mark.smoke
def test_a_secret_that_is_written_out_is_refused(tiny, chats, tmp_path):
    config = config_file.to_dict(run_config(tiny, chats, tmp_path / "run"))
    config["data"]["train"] = [{"path": FORMS[6]}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = sft_jax("inspect", tmp_path / "config.yaml")
    assert done.returncode == 2
    assert "data.train.0.path holds a token or password" in done.stderr
    assert "hunter2" not in done.stderr
    done = sft_jax("inspect", tmp_path / "config.yaml", "data.train=a.jsonl", "training.output_dir=${oc.env:A_TOKEN}")
    assert "training.output_dir refers to a secret, which only the path of a data source may" in done.stderr
