"""The base model of a run or an adapter: its location, and the check that it is the same model."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
import yaml
from kit import make_model, one_device, run_config, sft_jax, write_jsonl
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from sft_jax.assembly import open_model
from sft_jax.errors import UserError
from sft_jax.hf.reader import TensorReader, is_other_weights, is_same_model
from sft_jax.hf.ties import architecture_of
from sft_jax.run.export import export
from sft_jax.run.train import train
from sft_jax.store.same_run import check_same_run

IDS = np.random.default_rng(0).integers(0, 380, (2, 60))
EMBEDDINGS, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def change(folder, changes):
    """Replaces or adds tensors of a model by name; each function gets all tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, make in changes.items():
        tensors[name] = np.ascontiguousarray(make(tensors))
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def other_weights(tensors):
    """Changes one element in the middle of a weight, which the fingerprint samples."""
    changed = tensors["model.layers.1.mlp.up_proj.weight"].copy()
    changed.reshape(-1)[changed.size // 2] += 1
    return changed


@pytest.fixture
def trained(tmp_path, chats, monkeypatch):
    """A run and its adapter, created with relative paths; then the working directory changes."""
    home = tmp_path / "home"
    make_model(home / "base")
    monkeypatch.chdir(home)
    train(run_config("base", chats, "run", training__max_steps=1, model__path="base"), one_device())
    export("run", "adapter")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return home


def test_relative_paths_work_from_every_working_directory(trained, tmp_path):
    base = str(trained / "base")
    assert yaml.safe_load((trained / "run" / "config.yaml").read_text())["model"]["path"] == base
    assert json.loads((trained / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    for command in (
        ("generate", trained / "run", "--prompt", "river", "--max-new-tokens", 1),
        ("generate", trained / "adapter", "--prompt", "river", "--max-new-tokens", 1),
        ("export", trained / "run", tmp_path / "again"),
        ("train", trained / "run" / "config.yaml", f"training.output_dir={trained / 'run'}", "training.max_steps=1"),
    ):
        done = sft_jax(*command)
        assert done.returncode == 0, done.stderr


def test_a_base_that_has_moved(trained, tmp_path, chats):
    moved = tmp_path / "moved"
    shutil.move(trained / "base", moved)
    rows = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "river", "responses": ["bread"]}])
    evaluation = ("evaluate", trained / "run" / "config.yaml", f"training.output_dir={trained / 'run'}")
    evaluation += (f"data.eval=[{{path: {chats}, max_rows: 4}}]", "evaluation.num_questions=1")
    commands = [
        ("generate", trained / "run", "--prompt", "river", "--max-new-tokens", 1),
        ("generate", trained / "adapter", "--prompt", "river", "--max-new-tokens", 1),
        ("score", trained / "run", rows),
        ("export", trained / "run", tmp_path / "merged", "--format", "merged"),
        evaluation,
    ]
    for command in commands:
        done = sft_jax(*command)
        assert done.returncode == 2, command
        assert "Traceback" not in done.stderr
        assert sft_jax(*command, "--base", moved).returncode == 0, command
    config = trained / "run" / "config.yaml"
    resume = ("train", config, f"training.output_dir={trained / 'run'}", f"model.path={moved}")
    assert sft_jax(*resume).returncode == 0
    export(trained / "run", tmp_path / "adapter", base=str(moved))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        moved
    )


def test_other_weights_of_the_same_shapes(trained, tmp_path):
    other = shutil.copytree(trained / "base", tmp_path / "other")
    change(other, {"model.layers.1.mlp.up_proj.weight": other_weights})
    for command in (
        ("generate", trained / "run", "--prompt", "river", "--base", other),
        ("generate", trained / "adapter", "--prompt", "river", "--base", other),
        ("export", trained / "run", tmp_path / "merged", "--format", "merged", "--base", other),
    ):
        done = sft_jax(*command)
        assert done.returncode == 2, done.stderr
        assert "weights" in done.stderr
        assert "--base" in done.stderr
    config = trained / "run" / "config.yaml"
    done = sft_jax("train", config, f"training.output_dir={trained / 'run'}", f"model.path={other}")
    assert "the base model has changed since this run began" in done.stderr
    assert not (tmp_path / "merged").exists()


def test_fingerprints(tmp_path):
    base = TensorReader(make_model(tmp_path / "base")).fingerprint()
    assert TensorReader(shutil.copytree(tmp_path / "base", tmp_path / "copy")).fingerprint() == base
    other = change(tmp_path / "copy", {"model.layers.1.mlp.up_proj.weight": other_weights})
    other = TensorReader(other).fingerprint()
    assert is_other_weights(base, other)
    assert not is_same_model(base, other)
    assert is_same_model(base.split(":")[0], other)  # older versions have no hash of the weights
    half = {
        name: (lambda x, name=name: x[name].astype(ml_dtypes.bfloat16))
        for name in load_file(tmp_path / "base" / "model.safetensors")
    }
    assert not is_other_weights(base, TensorReader(change(tmp_path / "copy", half)).fingerprint())  # another dtype


def test_a_run_of_an_older_version_can_be_resumed():
    """Its checkpoints have a fingerprint without a hash of the weights, and configs without newer keys."""
    data = {"train": [{"path": "a.jsonl"}]}
    older, newer = {"model": {"path": "a"}, "data": data}, {"model": {"path": "b"}, "data": data}
    newer["training"] = {"output_dir": "runs/a", "router_aux_loss": 0.0}
    one = {"config": older, "data": "d", "base": "0123"}
    check_same_run("run", one, one | {"base": "0123:4567", "config": newer})
    with pytest.raises(UserError, match="the base model has changed"):
        check_same_run("run", one, one | {"base": "0124:4567"})
    random = one | {"base": "random"}
    with pytest.raises(UserError, match=r"holds a run with model\.path='a'"):
        check_same_run("run", random, random | {"config": newer})
    newer["training"]["router_aux_loss"] = 0.1
    with pytest.raises(UserError, match=r"holds a run with training\.router_aux_loss=0\.0, but the config has 0\.1"):
        check_same_run("run", one, one | {"base": "0123:4567", "config": newer})


@pytest.mark.parametrize(("noise", "lora"), [(0.0, True), (0.3, True), (1e-6, False), (0.3, False)])
def test_an_untied_lm_head_beside_a_tied_config(tmp_path, chats, noise, lora):
    """The weights decide whether it is tied in training and export; a copy of the embeddings counts as tied."""
    rng = np.random.default_rng(0)
    base = make_model(tmp_path / "base")
    change(base, {LM_HEAD: lambda x: (x[EMBEDDINGS] + noise * rng.normal(size=x[EMBEDDINGS].shape)).astype(np.float32)})
    untied = noise > 0
    assert architecture_of(base, TensorReader(base)).tie_word_embeddings != untied
    config = run_config(base, chats, tmp_path / "run", training__max_steps=2, **({} if lora else {"lora": None}))
    train(config, one_device())
    export(tmp_path / "run", tmp_path / "merged", "merged")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["tie_word_embeddings"] != untied
    for folder in (base, tmp_path / "merged"):
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor(IDS)).logits.numpy()
        opened = open_model(str(folder), devices=one_device())
        model = opened.network()
        ids = np.asarray(IDS, np.int32)
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        ours = np.asarray(model.logits(model(ids, np.ones_like(ids), positions)))
        np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=0)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert (LM_HEAD in tensors) == (untied or lora)
    assert not untied or not np.array_equal(tensors[LM_HEAD], tensors[EMBEDDINGS])
