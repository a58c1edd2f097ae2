"""Weights are read once in small ranges for any mesh, and written files can be read by the safetensors library."""

import json
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kit import make_model, one_device
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sft_jax.errors import UserError
from sft_jax.hf import place, reader
from sft_jax.hf.config import read_architecture
from sft_jax.hf.reader import TensorReader
from sft_jax.hf.save import Tensor, TensorWriter, save_tensors
from sft_jax.sharding import make_mesh
from sft_jax.training.weights import build, load_weights
from sft_jax.tree import flatten

smoke = pytest.mark.smoke


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model whose dimensions eight devices do not divide."""
    return make_model(
        tmp_path_factory.mktemp("base") / "base", hidden_size=60, intermediate_size=100, tie_word_embeddings=False
    )


@smoke
@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2)])
@pytest.mark.parametrize("chunk", [64 * 2**20, 5000])
def test_each_byte_is_read_once_and_sharded_correctly(base, monkeypatch, sizes, chunk):
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk)
    sizes_read = []
    original = TensorReader.read
    monkeypatch.setattr(
        TensorReader, "read", lambda self, *args: (lambda x: sizes_read.append(x.nbytes) or x)(original(self, *args))
    )
    devices = one_device() if sizes == (1, 1, 1) else None
    split = build(read_architecture(base), make_mesh(*sizes[:2], tensor=sizes[2], devices=devices), None, "float32")
    params, _ = load_weights(split, TensorReader(base))
    tensors = load_file(base / "model.safetensors")
    assert sum(sizes_read) == sum(x.nbytes for x in tensors.values())
    assert max(sizes_read) <= chunk
    for path, leaf in flatten(params).items():
        stored = split.stored[path]
        expected = [tensors[name].T if stored.transposed else tensors[name] for name in stored.names]
        assert np.array_equal(leaf, np.stack(expected) if path[0] == "layers" else expected[0]), path
        assert leaf.sharding == flatten(split.trainable)[path].sharding


@smoke
def test_dtypes_are_rounded_once(tmp_path):
    base = make_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    for dtype in (np.float64, np.float16, ml_dtypes.bfloat16):
        save_file({name: x.astype(dtype) for name, x in tensors.items()}, base / "model.safetensors")
        split = build(read_architecture(base), make_mesh(devices=one_device()), None, "bfloat16", full=False)
        _, frozen = load_weights(split, TensorReader(base))
        table = frozen["embed_tokens"]["weight"]
        assert table.dtype == jnp.bfloat16
        expected = tensors["model.embed_tokens.weight"].astype(dtype).astype(np.float32).astype(ml_dtypes.bfloat16)
        assert np.array_equal(table, expected)


@smoke
def test_rows_of_a_tensor(base):
    """Reads a whole tensor, ranges of it, and chunks."""
    ours, name = TensorReader(base), "model.layers.1.mlp.up_proj.weight"
    with safe_open(base / "model.safetensors", framework="numpy") as file:
        assert ours.names == set(file.keys())
        expected = file.get_tensor(name)
    assert np.array_equal(ours.read(name), expected)
    assert np.array_equal(ours.read(name, 7, 31), expected[7:31])
    assert ours.read(name, 31, 31).shape == (0, 60)
    chunks = list(reader.chunks(ours, name))
    assert np.array_equal(np.concatenate([rows for _, rows in chunks]), expected)


@smoke
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-100], "lies outside of the file"),
        (lambda raw: b"\xff" * 8 + raw[8:], "a header of"),
        (lambda raw: raw[:4], "a header of"),
        (lambda raw: raw[:8] + b"x" + raw[9:], "Expecting value"),
        (lambda raw: raw.replace(b'"shape":[60]', b'"shape":[61]'), "its shape needs"),
        (lambda raw: raw.replace(b'"dtype":"F32"', b'"dtypo":"F32"'), "lacks its dtype"),
    ],
)
def test_damaged_files(base, tmp_path, damage, message):
    raw = damage((base / "model.safetensors").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match=message) as error:
        TensorReader(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)


@smoke
def test_several_write_one_folder_in_any_order(tmp_path):
    """Three processes write mixed dtypes and ranges of tensors; the safetensors library reads the result."""
    rng = np.random.default_rng(0)
    values = {f"t{i}": rng.normal(size=(3 + i, 5)).astype([np.float32, ml_dtypes.bfloat16][i % 2]) for i in range(9)}
    tensors = {name: Tensor(x.shape, x.dtype) for name, x in values.items()}
    with ExitStack() as stack:
        writers = [stack.enter_context(TensorWriter(tmp_path, tensors, 200, i, 3)) for i in range(3)]
        for name in sorted(values, reverse=True):
            (owner,) = [writer for writer in writers if writer.owns(name)]
            owner.write(name, values[name][2:], 2)
            owner.write(name, values[name][:2])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in values.values())
    assert len(set(index["weight_map"].values())) > 3
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="numpy") as opened:
            assert opened.get_tensor(name).tobytes() == values[name].tobytes()
            assert opened.metadata() == {"format": "pt"}
    ours = TensorReader(tmp_path)
    assert all(ours.read(name).tobytes() == x.tobytes() for name, x in values.items())


@smoke
def test_one_file_is_what_the_library_writes(tmp_path):
    values = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(3, ml_dtypes.bfloat16)}
    save_tensors(tmp_path, {name: Tensor(x.shape, x.dtype) for name, x in values.items()}, values.__getitem__)
    save_file(values, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@smoke
def test_layers_share_a_program(base):
    """Tensors with equal recipes share a compiled program."""
    place._programs.cache_clear()
    arch = read_architecture(base)
    split = build(arch, make_mesh(devices=one_device()), None, "float32")
    jax.block_until_ready(load_weights(split, TensorReader(base)))
    assert place._programs.cache_info().currsize == 9  # for 12 leaves
