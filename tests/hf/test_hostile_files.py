"""Files of a model that are wrong are refused by name, before anything of an absurd size is made."""

import json
import os
import shutil
import struct

import numpy as np
import pytest
from kit import SIZES, make_model, make_tokenizer, one_device
from safetensors.numpy import load_file, save_file

from sft_jax.config import LoraConfig
from sft_jax.errors import UserError
from sft_jax.files.json_object import read_object
from sft_jax.hf.config import read_architecture, stop_ids
from sft_jax.hf.hub import find_model, weights_of
from sft_jax.hf.peft import base_fingerprint, read_adapter_config
from sft_jax.hf.reader import TensorReader
from sft_jax.hf.ties import architecture_of
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.hf.tokenizer_checks import check_ids
from sft_jax.models.families import families
from sft_jax.sharding import make_mesh
from sft_jax.training.weights import build, load_weights

LLAMA = {**SIZES, "model_type": "llama", "vocab_size": 384}
ROPE = {"rope_type": "longrope", "original_max_position_embeddings": 64, "short_factor": [1.0] * 6}
NAN = float("nan")


def written(folder, name, content):
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "too many brackets"),
        ('{"a":' * 100_000, "too many brackets"),
        (b'{"a": "\xff"}', "not valid JSON: 'utf-8' codec"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON: Exceeds the limit"),
        (" " * (16 * 2**20 + 1), "has 16,777,217 bytes"),
    ],
)
def test_json_of_any_kind(tmp_path, content, words):
    with pytest.raises(UserError, match=rf"a\.json: .*{words}"):
        read_object(written(tmp_path, "a.json", content) / "a.json")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, words in (("pipe", "not a file"), (".", "not a file"), ("loop", "cannot be read"), ("x", "no such file")):
        with pytest.raises(UserError, match=words):
            read_object(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is not a whole number from 1 to 2,000"),
        ({"vision_config": {"num_hidden_layers": 10**9}}, "vision_config.num_hidden_layers 1000000000"),
        ({"num_experts": 10**6}, "num_experts 1000000 is more than 10,000"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 is not a whole number from 1"),
        ({"hidden_size": "48"}, "Field 'hidden_size' expected int, got str"),
        ({"head_dim": -3}, "head_dim -3"),
        ({"head_dim": 11}, "head_dim"),
        ({"vocab_size": 10**400}, "vocab_size with more than 20 digits"),
        ({"rms_norm_eps": NAN}, "rms_norm_eps nan is not finite"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps -1.0 is negative"),
        ({"initializer_range": 1e200}, "initializer_range"),
        ({"sliding_window": 0}, "sliding_window 0 has to be positive"),
        ({"sliding_window": [512]}, r"sliding_window \[512\] is not a whole number"),
        ({"rope_theta": -1.0}, "rope_parameters.rope_theta -1.0 is not a positive number"),
        ({"rope_scaling": ROPE | {"long_factor": ["2"] * 6}}, "rope_parameters.long_factor 2 is not a positive number"),
        ({"rope_scaling": ROPE | {"long_factor": 3}}, "long_factor|len"),
        ({"model_type": ["llama"]}, r"model family \['llama'\] is not supported"),
        ({"layer_types": ["full_attention"] * 2}, "layer"),
    ],
)
def test_values_of_configs(tmp_path, changes, words):
    with pytest.raises(UserError, match=rf"config\.json: .*{words}"):
        read_architecture(written(tmp_path, "config.json", LLAMA | changes))


@pytest.mark.parametrize("family", sorted(families()))
def test_no_family_trips_over_wrong_values(tmp_path, family):
    """Every number of its config in turn becomes something else: any of it is read, or refused with a message."""
    from transformers import AutoConfig

    good = AutoConfig.for_model(family).to_dict()
    keys = [key for key, value in good.items() if type(value) in (int, float)]
    said = []
    for i, key in enumerate(keys):
        wrong = (-1, 0, 2.5, [3], {"a": 1}, "b", 10**9, None)[i % 8]
        try:
            read_architecture(written(tmp_path, "config.json", good | {key: wrong, "model_type": family}))
        except UserError as error:
            said.append(str(error))
    assert said
    assert all("config.json: " in one for one in said)


@pytest.mark.parametrize("ids", [True, "a", 2.0, -1, 2**31, [[1]], [None], [2, 10**12], list(range(1001)), {"a": 1}])
def test_stop_ids_that_are_none(tmp_path, ids):
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id .* is neither a token id nor"):
        stop_ids(written(tmp_path, "generation_config.json", {"eos_token_id": ids}))


def header(described, data=b""):
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    return struct.pack("<Q", len(text)) + text + data


FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header(b"[" * 100_000), "not valid JSON: too many brackets"),
        (header({"a": FOUR | {"dtype": ["F32"]}}, bytes(4)), "tensor a lacks its dtype"),
        (header({"a": FOUR | {"data_offsets": [0, True]}}, bytes(4)), "tensor a lies outside of the file"),
        (header({"a": FOUR | {"data_offsets": [0, 10**18]}}, bytes(4)), "tensor a lies outside of the file"),
        (header({"a": FOUR | {"shape": [1] * 9}}, bytes(4)), "tensor a has 9 dimensions"),
        (header({"a": FOUR, "b": FOUR}, bytes(4)), "tensor b does not begin where tensor a ends"),
        (header({"a": FOUR | {"data_offsets": [4, 8]}}, bytes(8)), "tensor a does not begin where the header ends"),
        (header({"a": FOUR}, bytes(8)), "4 bytes after its last tensor"),
        (header({"a": None}), "tensor a lacks its dtype"),
    ],
)
def test_headers(tmp_path, content, words):
    with pytest.raises(UserError, match=rf"model\.safetensors: damaged safetensors file: {words}"):
        TensorReader(written(tmp_path, "model.safetensors", content))


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "b/a.safetensors", "a.bin", "..", 3, None, [1]])
def test_an_index_names_files_beside_it(tmp_path, name):
    with pytest.raises(UserError, match=r"index\.json: names the file .*, which is no safetensors file beside it"):
        TensorReader(written(tmp_path, "model.safetensors.index.json", {"weight_map": {"a": name}}))


def test_a_tensor_in_two_files(tmp_path):
    for number in (1, 2):
        save_file({"a": np.ones(number, np.float32)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(UserError, match=r"tensor a is both in model-00001-of-00002.* and in model-00002-of-00002"):
        TensorReader(tmp_path)


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_are_checked_before_they_are_quantized(tmp_path, quantization, value):
    """Quantized, a weight that is not finite could look like any other."""
    sizes = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    base = make_model(tmp_path / "base", architectures=["MixtralForCausalLM"], sliding_window=None, **sizes)
    tensors = load_file(base / "model.safetensors")
    for name in (
        one for one in sorted(tensors) if ".layers.1." in one and one.endswith(("w2.weight", "q_proj.weight"))
    ):
        damaged = tensors | {name: tensors[name].copy()}
        damaged[name][3, 5] = value
        save_file(damaged, base / "model.safetensors")
        reader = TensorReader(base)
        mesh = make_mesh(devices=one_device())
        arch = architecture_of(base, reader)
        split = build(arch, mesh, LoraConfig(rank=2), "float32", quantization=quantization, full=False)
        with pytest.raises(UserError, match=rf"tensor {name} has weights that are not finite"):
            load_weights(split, reader)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": "4"}, "r='?4"),
        ({"r": 10**18}, "r=1000000000000000000 is not a positive number of at most 65,536"),
        ({"lora_alpha": NAN}, "lora_alpha=nan"),
        ({"target_modules": [1]}, "target_modules"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path"),
        ({"use_dora": "yes"}, "use_dora='yes' is neither true nor false"),
        ({"init_lora_weights": {"a": 1}}, "init_lora_weights"),
    ],
)
def test_settings_of_adapters(tmp_path, changes, words):
    good = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "base_model_name_or_path": "a/b",
        "target_modules": ["q_proj"],
    }
    assert read_adapter_config(written(tmp_path, "adapter_config.json", good)).rank == 4
    with pytest.raises(UserError, match=rf"adapter_config\.json: {words}"):
        read_adapter_config(written(tmp_path, "adapter_config.json", good | changes))


@pytest.mark.parametrize("metadata", [{"base_fingerprint": "a:b:c"}, {"base_fingerprint": 3}, [], {}, "a"])
def test_fingerprints_of_others(tmp_path, metadata):
    content = header({"__metadata__": metadata, "a": FOUR}, bytes(4))
    assert base_fingerprint(written(tmp_path, "adapter_model.safetensors", content)) is None


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with a tokenizer, and what is in its file."""
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path, json.loads((tmp_path / "tokenizer.json").read_text())


def test_tokenizers_that_libraries_cannot_read(tokenizer):
    folder, good = tokenizer
    model = good["model"]
    for change in (
        {"model": model | {"merges": [["qqq", "zzz"]]}},
        {"model": model | {"vocab": model["vocab"] | {"zzz": -1}}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}},
        {"added_tokens": [1]},
        {"normalizer": {"type": "Evil"}},
    ):
        with pytest.raises(UserError, match=r"no usable tokenizer: "):
            load_tokenizer(written(folder, "tokenizer.json", good | change))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not a JSON object"):
        load_tokenizer(written(written(folder, "tokenizer.json", good), "tokenizer_config.json", "[]"))


def test_tokenizers_that_take_all_memory(tokenizer):
    """Where memory ends, the library ends the process."""
    folder, good = tokenizer
    grows = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 1000}
    sequence = {"type": "Sequence", "normalizers": [grows, {"type": "Sequence", "normalizers": [grows, grows]}]}
    with pytest.raises(UserError, match=r"the normalizer of tokenizer.json writes [\d,]+ characters for a short text"):
        load_tokenizer(written(folder, "tokenizer.json", good | {"normalizer": sequence}))
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    padded = good | {"padding": padding | {"pad_to_multiple_of": None}}
    loaded, _ = load_tokenizer(written(folder, "tokenizer.json", padded))
    assert loaded.backend_tokenizer.padding is None
    umlauts = [{"type": "Replace", "pattern": {"String": a}, "content": a + "e"} for a in "äöüßåøæœéèêë"] * 3
    harmless = good | {"normalizer": {"type": "Sequence", "normalizers": umlauts}}
    load_tokenizer(written(folder, "tokenizer.json", harmless))


def test_ids_without_an_embedding(tokenizer):
    folder, good = tokenizer
    loaded, _ = load_tokenizer(folder)
    check_ids(loaded, 384)
    model = good["model"]
    far = good | {"model": model | {"vocab": model["vocab"] | {"zz": 10**6}}}
    loaded, _ = load_tokenizer(written(folder, "tokenizer.json", far))
    with pytest.raises(UserError, match=r"token 'zz' has the id 1,000,000, but there are 385 embeddings"):
        check_ids(loaded, 384)


def test_chat_templates_of_a_wrong_kind(tokenizer):
    folder, _ = tokenizer
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    with pytest.raises(UserError, match=r"chat_template"):
        load_tokenizer(written(folder, "tokenizer_config.json", config | {"chat_template": 3}))
    os.mkfifo(folder / "chat_template.jinja")
    with pytest.raises(UserError, match=r"chat_template\.jinja: not a file"):
        load_tokenizer(folder)


def test_no_file_says_where_weights_are(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    folder = find_model(str(written(tmp_path / "model", "weights.url", b"http://127.0.0.1:1/model")))
    assert weights_of(folder) == folder
