"""What Gemma 4 has besides layers: what its files hold for layers that share keys, and what is refused."""

import json

import numpy as np
import pytest
from families import reference
from kit import load_model, logits
from safetensors.numpy import load_file, save_file

from sft_jax.errors import UserError
from sft_jax.hf.config import read_architecture


def test_keys_of_layers_that_share_are_left_out(tmp_path):
    """Published files have projections of keys and values for layers that attend to those of others."""
    reference("gemma4_text-shared", tmp_path)
    ids = np.random.default_rng(0).integers(0, 131, (1, 20))
    expected = logits(load_model(tmp_path)[0], ids)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("k_proj", "v_proj", "k_norm"):
        tensors[f"model.layers.5.self_attn.{name}.weight"] = np.ones((3, 3), np.float32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    np.testing.assert_array_equal(logits(load_model(tmp_path)[0], ids), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all'"),
        ({"num_kv_shared_layers": 6}, "num_kv_shared_layers 6 leaves no layer .* full_attention, sliding_attention"),
        ({"num_kv_shared_layers": 5}, "num_kv_shared_layers 5 leaves no layer .* full_attention"),
        ({"vocab_size_per_layer_input": 130}, "131 tokens, .* 130 .*vocab_size_per_layer_input"),
    ],
)
def test_refused(tmp_path, changes, message):
    reference("gemma4_text-shared", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        read_architecture(tmp_path)


def test_images_do_not_change_text(tmp_path):
    reference("gemma4_text-shared", tmp_path)
    expected = read_architecture(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_bidirectional_attention": "vision"}))
    assert read_architecture(tmp_path) == expected
