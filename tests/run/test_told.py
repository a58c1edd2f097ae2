"""Errors and warnings about the machine, the base model and the config come early and name a fix."""

import errno
import json
import re
import tempfile
from collections import namedtuple

import numpy as np
import pytest
import yaml
from kit import losses, make_model, one_device, run_config, sft_jax, trained_leaves
from safetensors.numpy import load_file, save_file

from sft_jax.assembly import open_model
from sft_jax.config_file import to_dict
from sft_jax.errors import UserError
from sft_jax.hf.reader import TensorReader
from sft_jax.hf.untrained import untrained_tokens
from sft_jax.run.export import export
from sft_jax.run.train import train
from sft_jax.store import checkpoint

EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture
def config(tiny, chats, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(run_config(tiny, chats, tmp_path / "run", training__max_steps=2))))
    return path


@pytest.mark.parametrize(
    ("path", "words"),
    [("file/run", "file is a file"), ("file", "file is a file"), ("/proc/run", "/proc cannot be written")],
)
def test_an_unwritable_directory_is_reported_before_the_data_are_read(config, tmp_path, path, words):
    (tmp_path / "file").touch()
    done = sft_jax("train", config, f"training.output_dir={tmp_path / path}")
    assert done.returncode == 2
    assert words in done.stderr
    assert "data" not in done.stderr


def test_a_disk_without_room_for_a_checkpoint(config, tmp_path, monkeypatch):
    """The error comes before anything is written; once there is space, the run resumes from the last checkpoint."""
    usage = namedtuple("usage", "free")
    free = iter([10**9, 10])
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(next(free)))
    done = sft_jax("train", config, "training.save_every=1")
    assert done.returncode == 2
    assert "the checkpoint of step 2 needs 0 MB, but only 0 MB are free; free some space" in done.stderr
    assert done.stderr.rstrip().endswith("it resumes from step 1")
    monkeypatch.undo()
    done = sft_jax("train", config, "training.save_every=1")
    assert "resume  at step 1 of 2" in done.stderr
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("error", "command", "words"),
    [
        (
            OSError(errno.ENOSPC, "x", "a/b"),
            "train",
            "a/b: cannot be written: no space .* it resumes from the last checkpoint",
        ),
        (ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os]"), "export", "no space left"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a/b"),
            "export",
            "a/b: Permission denied; use another path",
        ),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "train", "sft-jax plan computes the"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "generate", "a smaller --batch-size"),
        (MemoryError(), "inspect", r"fewer rows \(data\.\*\.max_rows\)"),
    ],
)
def test_errors_of_the_machine_name_a_fix(config, monkeypatch, error, command, words):
    """The command prints no traceback, even if the error is the cause of another error."""

    def fail(*_, **__):
        raise RuntimeError("an error of a library") from error

    functions = {"train": "api.train", "inspect": "run.inspect.inspect", "export": "api.export"}
    monkeypatch.setattr(f"sft_jax.{functions.get(command, 'assembly.open_model')}", fail)
    arguments = {"train": [config], "inspect": [config], "export": ["run", "out"], "generate": ["m", "--prompt", "a"]}
    done = sft_jax(command, *arguments[command])
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()[-1:]
    assert "Traceback" not in done.stderr
    assert re.search(words, line), line


class PanicException(BaseException):
    """Stands in for the exception of libraries in Rust."""


@pytest.mark.parametrize("error", [ValueError("a\nbug"), PanicException("a\nbug"), FileNotFoundError(2, "a\nbug", "a")])
def test_a_bug_is_one_line_and_a_file(config, monkeypatch, tmp_path, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("sft_jax.api.train", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = sft_jax("train", config)
    assert done.returncode == 70
    (line,) = done.stderr.splitlines()
    place = r"sft-jax: an error that sft-jax does not know at commands/train.py:\d+: "
    assert re.match(rf"{place}{type(error).__name__}: .*a\\nbug.*; its traceback is in (\S+); please report it", line)
    (file,) = tmp_path.glob("sft-jax-error-*.txt")
    assert "in fail\n    raise error" in file.read_text()
    with pytest.raises(type(error)):
        sft_jax("train", config, "--debug")


@pytest.mark.parametrize(("warmup", "steps"), [(0.9, 1), (0.6, 1), (0.4, 1)])
def test_a_rate_that_never_leaves_zero(tiny, chats, tmp_path, warmup, steps):
    config = run_config(tiny, chats, tmp_path / "run", training__max_steps=steps, optimizer__warmup_ratio=warmup)
    if round(warmup * steps) == 0:
        assert train(config, one_device())["learning_rate"] > 0
        return
    with pytest.raises(UserError, match=r"optimizer\.warmup_ratio: .* and no step has a rate above 0"):
        train(config, one_device())
    assert not (tmp_path / "run").exists()


def test_a_finished_run_explains_how_to_train_further(config):
    assert sft_jax("train", config).returncode == 0
    done = sft_jax("train", config, "training.max_steps=4")
    assert done.returncode == 2
    assert "start a new run with training.continue_from=" in done.stderr


def with_rows(folder, rows):
    tensors = load_file(folder / "model.safetensors")
    tensors[EMBEDDINGS] = tensors[EMBEDDINGS].copy()
    for i, row in rows.items():
        tensors[EMBEDDINGS][i] = row if np.ndim(row) else row * tensors[EMBEDDINGS][i]
    save_file(tensors, folder / "model.safetensors")
    return folder


UNTRAINED = [{1: 0.0, 2: 0.0}, {1: 1e-5, 2: 1e-5}, {1: np.full(48, 0.08), 2: np.full(48, 0.0801)}]


@pytest.mark.parametrize("rows", UNTRAINED)
def test_untrained_embeddings_are_detected(tmp_path, rows):
    """They are zero, tiny or alike."""
    reader = TensorReader(with_rows(make_model(tmp_path / "base"), rows))
    assert untrained_tokens(reader, EMBEDDINGS, [1, 2]) == [1, 2]
    assert untrained_tokens(reader, EMBEDDINGS, [0, 3, 50, 10_000]) == []


def test_special_tokens_that_the_base_was_never_trained_with(chats, tmp_path, capsys):
    """They are reported before the first step with the key that trains them, and that key trains them."""
    base = with_rows(make_model(tmp_path / "base"), UNTRAINED[0])
    settings = {"training__max_steps": 2, "optimizer__learning_rate": 0.01}
    train(run_config(base, chats, tmp_path / "lora", **settings), one_device())
    printed = capsys.readouterr().err
    assert "untrained  '<|im_start|>', '<|im_end|>': their embeddings were never trained" in printed
    assert printed.index("untrained") < printed.index("step 1/2")
    assert "lora.train_embeddings=true" in printed
    train(run_config(base, chats, tmp_path / "embeddings", lora__train_embeddings=True, **settings), one_device())
    assert "untrained" not in capsys.readouterr().err
    embeddings = trained_leaves(tmp_path / "embeddings")[("embed_tokens", "weight")]
    before = load_file(base / "model.safetensors")[EMBEDDINGS]
    assert np.abs(embeddings[1] - before[1]).max() > 1e-3
    export(tmp_path / "embeddings", tmp_path / "adapter")
    assert "vLLM and llama.cpp do not; use --format merged for these" in capsys.readouterr().out
    assert f"base_model.model.{EMBEDDINGS}" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    opened = open_model(str(tmp_path / "adapter"), devices=one_device())
    np.testing.assert_array_equal(opened.frozen["embed_tokens"]["weight"], embeddings)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
