"""The tensors and files of a base model are what a run began with, or named."""

import json
import shutil

import numpy as np
import pytest
from kit import config_of, make_model, one_device

from sft_jax.config import LoraConfig
from sft_jax.errors import UserError
from sft_jax.files.digests import texts
from sft_jax.hf import reader
from sft_jax.hf.config import read_architecture
from sft_jax.hf.reader import TensorReader
from sft_jax.hf.verify import check_tensors, read_verified
from sft_jax.run.export import export
from sft_jax.run.train import train
from sft_jax.sharding import make_mesh
from sft_jax.training.weights import build, load_weights

NAME = "model.layers.1.mlp.up_proj.weight"


def flip(folder, name):
    """Flip a bit of a tensor where its fingerprint has no sample."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start, stop = json.loads(content[8 : 8 + size])[name]["data_offsets"]
    at = 8 + size + start + (stop - start) // 4
    content[at] ^= 1
    path.write_bytes(content)


def digests(folder, mesh, quantization=None):
    split = build(read_architecture(folder), mesh, LoraConfig(), "float32", quantization=quantization)
    words = {}
    load_weights(split, TensorReader(folder), LoraConfig(), digests=words)
    return words


@pytest.mark.smoke
def test_digests_are_of_the_files(tmp_path, monkeypatch):
    """Whatever the mesh, the quantization, and the ranges in which the files are read."""
    base = make_model(tmp_path / "base", hidden_size=64, intermediate_size=96)
    one = texts(digests(base, make_mesh(devices=one_device())))
    assert one.keys() == TensorReader(base).names
    assert one == texts(digests(base, make_mesh(2, 2, tensor=2)))
    assert one == texts(digests(base, make_mesh(devices=one_device()), "nf4"))
    for size in (64 * 2**20, 1000):
        monkeypatch.setattr(reader, "CHUNK_BYTES", size)
        for name in one:
            whole = read_verified(TensorReader(base), name, one)
            assert np.array_equal(whole, np.atleast_1d(TensorReader(base).read(name)))
    flip(base, NAME)
    with pytest.raises(UserError, match=rf"tensor {NAME} is not what the run began with"):
        check_tensors(TensorReader(base), one, texts(digests(base, make_mesh(devices=one_device()))))
    with pytest.raises(UserError, match=rf"tensor {NAME} is not what the run began with"):
        read_verified(TensorReader(base), NAME, one)


def test_a_base_that_was_damaged_since_is_refused(chats, tmp_path):
    base, run = make_model(tmp_path / "base"), tmp_path / "run"
    config = config_of(base, chats, run, training__max_steps=2)
    train(config, one_device())
    shutil.copytree(base, tmp_path / "good")
    flip(base, NAME)
    for use in (
        lambda: train(config, one_device()),
        lambda: export(str(run), str(tmp_path / "out"), "merged"),
    ):
        with pytest.raises(UserError, match=rf"tensor {NAME} is not what the run began with"):
            use()
    assert not (tmp_path / "out").exists()
    shutil.copyfile(tmp_path / "good" / "model.safetensors", base / "model.safetensors")
    export(str(run), str(tmp_path / "out"), "merged")
    text = (base / "config.json").read_text()
    (base / "config.json").write_text(text.replace("1e-05", "1e-04").replace("1e-5", "1e-4") + " ")
    with pytest.raises(UserError, match=r"config\.json: is not what the run began with"):
        export(str(run), str(tmp_path / "other"), "merged")
