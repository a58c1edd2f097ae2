"""Logits equal transformers' for every family; what is imported and exported untouched is the same bytes."""

import numpy as np
import pytest
import torch
import transformers
from kit import load_model, logits
from safetensors.numpy import load_file

from sft_jax.hf.reader import TensorReader
from sft_jax.hf.save import Tensor, save_tensors
from sft_jax.tree import flatten

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 42,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 400,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama2": ("Llama", {"num_key_value_heads": 6, "head_dim": 8}),
    "llama3": ("Llama", {"head_dim": 10, "rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "Llama",
        {"head_dim": 8, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama-yarn": (
        "Llama",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama-yarn-as-deepseek": (
        "Llama",
        {
            "head_dim": 24,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e5,
                "factor": 8.0,
                "original_max_position_embeddings": 50,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "truncate": False,
            },
        },
    ),
    "llama-dynamic-rope": (
        "Llama",
        {"head_dim": 8, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama-biases": ("Llama", {"head_dim": 12, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"head_dim": 14, "sliding_window": 9}),
    "mistral-no-window": ("Mistral", {"head_dim": 10, "sliding_window": None}),
    "qwen2": ("Qwen2", {"hidden_size": 48, "tie_word_embeddings": True}),
    "qwen2-windows": (
        "Qwen2",
        {"hidden_size": 48, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "gemma3_text": (
        "Gemma3",
        {
            "head_dim": 10,
            "num_hidden_layers": 8,
            "sliding_window": 9,
            "query_pre_attn_scalar": 18,
            "tie_word_embeddings": True,
            "final_logit_softcapping": 20.0,
        },
    ),
    "mixtral": (
        "Mixtral",
        {
            "hidden_size": 48,  # torch's grouped products want multiples of 4
            "intermediate_size": 100,
            "head_dim": 10,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 20}),
    "qwen3-tied": (
        "Qwen3",
        {"head_dim": 6, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
}


def reference(name: str, folder, shard: str | None = None):
    kind, changes = FAMILIES[name]
    config = getattr(transformers, f"{kind}{'Text' * (kind == 'Gemma3')}Config")(**(SHAPE | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3 if parameter.ndim == 1 else 0.1)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return model


def as_written(tensors):
    return {name: Tensor(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def file_tensors(params, stored):
    """Our leaves under Hugging Face names."""
    tensors = {}
    for path, leaf in flatten(params).items():
        for number, name in enumerate(stored[path].names):
            one = np.asarray(leaf)[stored[path].index(number)]
            tensors[name] = one.T if stored[path].transposed else one
    return tensors


@pytest.mark.parametrize("name", FAMILIES)
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
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


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
