"""Logits equal transformers' for every family; what is imported and exported untouched is the same bytes."""

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, reference
from kit import load_model, logits
from safetensors.numpy import load_file

from sft_jax.hf.load import outside_tensors
from sft_jax.hf.reader import TensorReader
from sft_jax.hf.save import Tensor, save_tensors
from sft_jax.tree import flatten


def as_written(tensors):
    return {name: Tensor(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def file_tensors(params, stored):
    """Our leaves under Hugging Face names."""
    tensors = {}
    for path, leaf in flatten(params).items():
        for number, name in enumerate(stored[path].names):
            tensors[name] = stored[path].tensor(np.asarray(leaf), number)
    return tensors


# By default those with the most of their own; all of them where models or their families change.
ALWAYS = (
    *("llama3", "llama-biases", "qwen2-windows", "qwen3-tied", "gemma3_text", "gemma4_text-experts", "gemma4"),
    *("phi", "phi3-longrope", "gpt2", "apertus", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text", "qwen3_5_moe"),
    *("qwen3_next", "granitemoehybrid-experts", "falcon_h1-norm-after-gate", "lfm2_moe"),
)


@pytest.mark.parametrize(
    "name",
    [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.drill("sft_jax/models")) for name in FAMILIES],
)
def test_logits_and_bytes(name, tmp_path):
    model = reference(name, tmp_path / "theirs")
    ids = np.random.default_rng(0).integers(0, 131, (2, 150))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    ours, split, params = load_model(tmp_path / "theirs")
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(ours, ids), expected, atol=1e-4, rtol=0)

    tensors = file_tensors(params, split.stored)
    (tmp_path / "ours").mkdir()
    save_tensors(tmp_path / "ours", as_written(tensors), tensors.__getitem__)
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    buffers = {name for path in flatten(split.frozen) for name in split.stored[path].names}
    outside = outside_tensors(TensorReader(tmp_path / "theirs"), split.arch)
    assert before.keys() == after.keys() | buffers | set(outside)
    assert bool(outside) == split.arch.is_part
    assert all(before[name].tobytes() == after[name].tobytes() for name in after)


def test_published_layout_of_olmo_hybrid(tmp_path):
    """The convolutions and norms as they are published: transformers saves them otherwise, and reads both."""
    reference("olmo_hybrid", tmp_path)
    ids = np.random.default_rng(0).integers(0, 131, (1, 20))
    expected = logits(load_model(tmp_path)[0], ids)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in (0, 1):
        names = [f"model.layers.{layer}.linear_attn.{part}_conv1d.weight" for part in "qkv"]
        parts = np.split(np.concatenate([tensors[name] for name in names]), [24, 48])
        tensors |= dict(zip(names, parts, strict=True))
    layer = "model.layers.2"
    tensors[f"{layer}.post_attention_layernorm.weight"] = tensors.pop(f"{layer}.feedforward_layer_norm.weight")
    save_tensors(tmp_path, as_written(tensors), tensors.__getitem__)
    ours, _, _ = load_model(tmp_path)
    np.testing.assert_allclose(logits(ours, ids), expected, atol=1e-6)


def test_published_layout_of_qwen3_5_moe(tmp_path):
    """All experts of a layer in one tensor, as they are published: transformers saves them one by one."""
    reference("qwen3_5_moe_text", tmp_path)
    before = load_model(tmp_path)[2]
    tensors = load_file(tmp_path / "model.safetensors")
    for experts in (f"model.layers.{layer}.mlp.experts" for layer in range(3)):
        gate, up, down = (
            np.stack([tensors.pop(f"{experts}.{expert}.{name}.weight") for expert in range(5)])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        tensors |= {f"{experts}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{experts}.down_proj": down}
    save_tensors(tmp_path, as_written(tensors), tensors.__getitem__)
    _, split, params = load_model(tmp_path)
    assert flatten(params).keys() == flatten(before).keys()
    assert all(np.array_equal(leaf, flatten(before)[path]) for path, leaf in flatten(params).items())
    after = file_tensors(params, split.stored)
    assert all(after[name].tobytes() == tensors[name].tobytes() for name in after)


@pytest.mark.parametrize("name", ["llama3", "qwen3-tied"])
def test_sharded_files(name, tmp_path):
    model = reference(name, tmp_path / "sharded", shard="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    ids = np.random.default_rng(0).integers(0, 131, (1, 20))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    ours, split, params = load_model(tmp_path / "sharded")
    np.testing.assert_allclose(logits(ours, ids), expected, atol=1e-4, rtol=0)

    tensors = file_tensors(params, split.stored)
    (tmp_path / "ours").mkdir()
    save_tensors(tmp_path / "ours", as_written(tensors), tensors.__getitem__, shard_bytes=60_000)
    (tmp_path / "ours" / "config.json").write_bytes((tmp_path / "sharded" / "config.json").read_bytes())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(torch.tensor(ids)).logits, model(torch.tensor(ids)).logits)
    assert TensorReader(tmp_path / "ours").fingerprint() == TensorReader(tmp_path / "sharded").fingerprint()


def test_bfloat16_stays_itself(tmp_path):
    model = reference("qwen3", tmp_path / "float32").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    _, split, params = load_model(tmp_path / "bfloat16")  # float32 master weights
    reader = TensorReader(tmp_path / "bfloat16")
    for name, tensor in file_tensors(params, split.stored).items():
        assert tensor.astype(reader.dtype(name)).tobytes() == reader.read(name).tobytes()
