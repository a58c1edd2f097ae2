"""``--dtype`` of merged exports."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from kit import logits, make_model, one_device, run_config, run_model, sft_jax
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from sft_jax.run.train import train

IDS = np.random.default_rng(0).integers(0, 380, (1, 40))
WEIGHTS = "model.safetensors"


def cast(folder, dtype):
    """Give the files of a model another dtype."""
    tensors = {name: one.astype(dtype) for name, one in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("kind", "stored", "wanted"),
    [
        ("lora", "float32", "bfloat16"),
        ("full", "float16", "bfloat16"),
        ("lora", "float32", "float16"),
        ("full", "bfloat16", "float32"),
    ],
)
def test_all_tensors_have_it_and_the_model_is_the_same(chats, tmp_path, kind, stored, wanted):
    base = cast(make_model(tmp_path / "base", torch_dtype=stored), stored)
    changes = {"lora": None} if kind == "full" else {}
    train(run_config(base, chats, tmp_path / "run", training__max_steps=4, **changes), one_device())
    done = sft_jax("export", tmp_path / "run", tmp_path / "out", "--format", "merged", "--dtype", wanted, "--check")
    assert done.returncode == 0, done.stderr + done.stdout
    before, after = load_file(base / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert {str(one.dtype) for one in after.values()} == {wanted}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == wanted
    if kind == "lora":
        kept = [name for name in before if "proj" not in name]
        assert kept
        assert all(np.array_equal(before[name].astype(wanted), after[name]) for name in kept)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert str(model.dtype) == f"torch.{wanted}"
    with torch.no_grad():
        theirs = model.float()(torch.tensor(IDS)).logits.numpy()
    ours = logits(run_model(tmp_path / "run"), IDS)
    np.testing.assert_allclose(theirs, ours, atol={"bfloat16": 0.1, "float16": 0.01, "float32": 1e-3}[wanted], rtol=0)


def test_what_float16_cannot_hold_is_refused(chats, tmp_path):
    base = make_model(tmp_path / "base")
    tensors = load_file(base / WEIGHTS)
    tensors["model.embed_tokens.weight"][5, 3] = 70_000
    save_file(tensors, base / WEIGHTS)
    train(run_config(base, chats, tmp_path / "run", training__max_steps=0), one_device())
    done = sft_jax("export", tmp_path / "run", tmp_path / "out", "--format", "merged", "--dtype", "float16")
    assert done.returncode == 2
    assert "model.embed_tokens.weight: has numbers beyond 65504, the largest of float16" in done.stderr
    assert not (tmp_path / "out").exists()
    done = sft_jax("export", tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16")
    assert done.returncode == 2
    assert "--dtype: is for --format merged" in done.stderr
    done = sft_jax("export", tmp_path / "run", tmp_path / "out", "--format", "merged", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    embeddings = load_file(tmp_path / "out" / WEIGHTS)["model.embed_tokens.weight"]
    assert embeddings[5, 3] == ml_dtypes.bfloat16(70_000)
