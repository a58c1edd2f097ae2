"""The files of a run, and whole runs on several devices and in bfloat16."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kit import conversations, losses, one_device, run_config, trained_leaves, write_jsonl

from sft_jax import config_file as configs
from sft_jax.config import MeshConfig, SourceConfig
from sft_jax.run.train import train

FIELDS = {
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "token_accuracy",
    "entropy",
    "target_tokens",
    "real_tokens",
    "slot_tokens",
    "real_tokens_per_second",
    "step_seconds",
}


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_run_folder(tiny, chats, tmp_path, capsys):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", conversations(6, seed=9))
    config = run_config(
        tiny,
        chats,
        tmp_path / "run",
        data__eval=[SourceConfig(path=str(held_out))],
        training__eval_every=4,
        training__tensorboard=True,
    )
    last = train(config, one_device())
    rows = rows_of(tmp_path / "run")
    steps = [row for row in rows if "loss" in row]
    held_out_rows = [row for row in rows if "eval_loss" in row]
    assert all(row.keys() == FIELDS for row in steps)
    assert [row["step"] for row in steps] == list(range(1, 7))
    assert [row["step"] for row in held_out_rows] == [0, 4, 6]
    assert held_out_rows[-1]["eval_loss"] < held_out_rows[0]["eval_loss"]
    assert last["loss"] == steps[-1]["loss"]
    assert all(0 < row["target_tokens"] < row["real_tokens"] <= row["slot_tokens"] == 4 * 128 for row in steps)
    assert configs.load(tmp_path / "run" / "config.yaml") == config
    assert (tmp_path / "run" / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")
    events = b"".join(path.read_bytes() for path in (tmp_path / "run" / "tensorboard").iterdir())
    assert b"eval/loss" in events
    assert b"train/grad_norm" in events
    printed = capsys.readouterr().err
    for words in ("40 of 40 rows", "stop token '<|im_end|>'", "LoRA rank 4", "attention xla", "float32", "packed"):
        assert words in printed


def test_held_out_loss_does_not_depend_on_batch_or_packing(tiny, chats, tmp_path):
    def first(name, **changes):
        config = run_config(
            tiny,
            chats,
            tmp_path / name,
            data__eval=[SourceConfig(path=str(chats))],
            training__max_steps=0,
            **changes,
        )
        return train(config, one_device())["eval_loss"]

    reference = first("a")
    assert first("b", training__batch_size=7) == pytest.approx(reference, rel=1e-6)
    assert first("c", data__packing=False) == pytest.approx(reference, rel=1e-6)


def test_weights_that_do_not_divide_over_the_devices_are_announced(tiny, chats, tmp_path, capsys):
    """Five devices cannot hold a fifth each, because the model dimension is 48."""
    for fsdp, whole in ((5, True), (2, False)):
        config = run_config(tiny, chats, tmp_path / str(fsdp), training__max_steps=0, training__batch_size=fsdp)
        train(config, jax.devices()[:fsdp])
        warning = re.search(
            r"each device holds ([\d.]+) MB of weights, and an even split would be ([\d.]+)", capsys.readouterr().err
        )
        assert (warning is not None) == whole
        if warning:
            assert 4.5 < float(warning[1]) / float(warning[2]) < 5.5  # printed with two digits


def test_eight_devices_and_back(tiny, chats, tmp_path):
    """Losses are the same on one device and on eight, and a run on eight devices resumes on one."""

    def config(name, **changes):
        return run_config(tiny, chats, tmp_path / name, training__batch_size=8, training__save_every=3, **changes)

    train(config("one"), one_device())
    train(config("eight", mesh=MeshConfig(data=2, sequence=2, tensor=2)))
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "one"), rtol=1e-5)
    checkpoints = tmp_path / "eight" / "checkpoints"
    (checkpoints / "6").rename(tmp_path / "later")
    train(config("eight"), one_device())
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "one"), rtol=1e-5)


def test_bfloat16_base_with_float32_adapters(tiny, chats, tmp_path):
    config = run_config(tiny, chats, tmp_path / "run", model__dtype="bfloat16", training__max_steps=12)
    train(config, one_device())
    reference = run_config(tiny, chats, tmp_path / "reference", training__max_steps=12)
    train(reference, one_device())
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "reference"), rtol=0.02)
    params = trained_leaves(tmp_path / "run")
    assert {leaf.dtype for leaf in params.values()} == {np.dtype(np.float32)}
    assert any(np.any(leaf != leaf.astype(jnp.bfloat16).astype(np.float32)) for leaf in params.values())
