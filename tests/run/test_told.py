"""What a run says of the machine, of the base model and of its own settings before it costs anybody time."""

import errno
import json
import re
from collections import namedtuple

import numpy as np
import pytest
import yaml
from kit import losses, make_model, one_device, run_config, sft_jax, trained_leaves
from safetensors.numpy import load_file, save_file

from sft_jax import outside_faults
from sft_jax.assembly import open_model
from sft_jax.config_file import to_dict
from sft_jax.errors import UserError
from sft_jax.hf.reader import TensorReader
from sft_jax.hf.untrained import untrained_rows
from sft_jax.run.export import export
from sft_jax.run.train import train
from sft_jax.store import checkpoint

TABLE = "model.embed_tokens.weight"


@pytest.fixture
def config(tiny, chats, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(run_config(tiny, chats, tmp_path / "run", training__max_steps=2))))
    return path


@pytest.mark.parametrize(
    ("place", "words"),
    [("file/run", "file is a file"), ("file", "file is a file"), ("/proc/run", "/proc cannot be written")],
)
def test_a_folder_that_cannot_be_written_is_told_before_the_data_are_read(config, tmp_path, place, words):
    (tmp_path / "file").touch()
    done = sft_jax("train", config, f"training.output_dir={tmp_path / place}")
    assert done.returncode == 2
    assert words in done.stderr
    assert "data" not in done.stderr


def test_a_disk_without_room_for_a_checkpoint(config, tmp_path, monkeypatch):
    """Told before half of it is written; once there is room, the run goes on from the last one."""
    usage = namedtuple("usage", "free")
    room = iter([10**9, 10])
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(next(room)))
    done = sft_jax("train", config, "training.save_every=1")
    assert done.returncode == 2
    assert "0 MB are free and the checkpoint of step 2 takes 0; free some" in done.stderr
    assert done.stderr.rstrip().endswith("goes on from step 1")
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
            "a/b: cannot be written: no space .* goes on from the last checkpoint",
        ),
        (ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os]"), "export", "no space is left"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a/b"),
            "export",
            "a/b: Permission denied; name another place",
        ),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "train", "sft-jax plan tells how much"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "generate", "a smaller --batch-size"),
        (MemoryError(), "inspect", r"fewer rows \(data\.\*\.max_rows\)"),
    ],
)
def test_faults_of_the_machine_have_a_way_out(config, monkeypatch, error, command, words):
    """Also where they are the cause of another error; the command ends without a traceback."""

    def fail(*_, **__):
        raise RuntimeError("what a library makes of it") from error

    called = {"train": "api.train", "inspect": "run.inspect.inspect", "export": "api.export"}
    monkeypatch.setattr(f"sft_jax.{called.get(command, 'assembly.open_model')}", fail)
    arguments = {"train": [config], "inspect": [config], "export": ["run", "out"], "generate": ["m", "--prompt", "a"]}
    done = sft_jax(command, *arguments[command])
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()[-1:]
    assert "Traceback" not in done.stderr
    assert re.search(words, line), line


def test_faults_of_the_library_keep_their_traceback():
    assert outside_faults.told(ValueError("a bug"), "train") is None
    assert outside_faults.told(FileNotFoundError(errno.ENOENT, "No such file", "a"), "train") is None


@pytest.mark.parametrize(("warmup", "steps"), [(0.9, 1), (0.6, 1), (0.4, 1)])
def test_a_rate_that_never_leaves_zero(tiny, chats, tmp_path, warmup, steps):
    config = run_config(tiny, chats, tmp_path / "run", training__max_steps=steps, optimizer__warmup_ratio=warmup)
    if round(warmup * steps) == 0:
        assert train(config, one_device())["learning_rate"] > 0
        return
    with pytest.raises(UserError, match=r"optimizer\.warmup_ratio: .* and none is left to train with it"):
        train(config, one_device())
    assert not (tmp_path / "run").exists()


def test_a_finished_run_says_how_to_train_on(config):
    assert sft_jax("train", config).returncode == 0
    done = sft_jax("train", config, "training.max_steps=4")
    assert done.returncode == 2
    assert "start another run from its export (lora.init_from or model.path)" in done.stderr


def with_rows(folder, rows):
    tensors = load_file(folder / "model.safetensors")
    tensors[TABLE] = tensors[TABLE].copy()
    for i, row in rows.items():
        tensors[TABLE][i] = row if np.ndim(row) else row * tensors[TABLE][i]
    save_file(tensors, folder / "model.safetensors")
    return folder


UNTRAINED = [{1: 0.0, 2: 0.0}, {1: 1e-5, 2: 1e-5}, {1: np.full(48, 0.08), 2: np.full(48, 0.0801)}]


@pytest.mark.parametrize("rows", UNTRAINED)
def test_embeddings_that_tell_nothing(tmp_path, rows):
    """Zero, tiny or alike."""
    reader = TensorReader(with_rows(make_model(tmp_path / "base"), rows))
    assert untrained_rows(reader, [1, 2]) == [1, 2]
    assert untrained_rows(reader, [0, 3, 50, 10_000]) == []


def test_special_tokens_that_the_base_was_never_trained_with(chats, tmp_path, capsys):
    """Said before the first step, with the key that trains them; and it does."""
    base = with_rows(make_model(tmp_path / "base"), UNTRAINED[0])
    settings = {"training__max_steps": 2, "optimizer__learning_rate": 0.01}
    train(run_config(base, chats, tmp_path / "lora", **settings), one_device())
    said = capsys.readouterr().err
    assert "untrained  '<|im_start|>', '<|im_end|>': their rows of the token table were never trained" in said
    assert said.index("untrained") < said.index("step 1/2")
    assert "lora.train_embeddings=true" in said
    train(run_config(base, chats, tmp_path / "tables", lora__train_embeddings=True, **settings), one_device())
    assert "untrained" not in capsys.readouterr().err
    table = trained_leaves(tmp_path / "tables")[("embed_tokens", "weight")]
    before = load_file(base / "model.safetensors")[TABLE]
    assert np.abs(table[1] - before[1]).max() > 1e-3
    export(tmp_path / "tables", tmp_path / "adapter")
    assert "vLLM and llama.cpp do not: give these --format merged" in capsys.readouterr().out
    assert f"base_model.model.{TABLE}" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    opened = open_model(str(tmp_path / "adapter"), devices=one_device())
    np.testing.assert_array_equal(opened.frozen["embed_tokens"]["weight"], table)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
