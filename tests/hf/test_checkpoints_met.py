"""Unusual checkpoints: loaded where that is safe, otherwise refused with the reason and a fix."""

import json

import ml_dtypes
import numpy as np
import pytest
from kit import logits, make_model, one_device, run_config, run_model, sft_jax
from safetensors.numpy import load_file, save_file

from sft_jax.assembly import open_model
from sft_jax.errors import UserError
from sft_jax.hf.config import read_architecture
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.run.export import export
from sft_jax.run.train import train

IDS = np.random.default_rng(0).integers(0, 380, (2, 40))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 19572\n"
WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path):
    return make_model(tmp_path / "base")


def opened_logits(folder):
    opened = open_model(str(folder), devices=one_device())
    model = opened.network()
    return logits(model, IDS)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (np.float32, np.nan),
        (np.float16, np.inf),
        (ml_dtypes.bfloat16, -np.inf),
        (np.float64, np.nan),
        (np.float64, 1e39),
    ],
)
def test_a_weight_that_is_not_finite_is_named(base, dtype, value):
    """The largest finite number of a dtype is accepted if float32 can represent it."""
    tensors = {name: x.astype(dtype) for name, x in load_file(base / WEIGHTS).items()}
    tensors[UP][-1, -1] = min(float(ml_dtypes.finfo(dtype).max), float(np.finfo(np.float32).max))
    save_file(tensors, base / WEIGHTS)
    open_model(str(base), devices=one_device())
    tensors[UP][-1, -1] = value
    save_file(tensors, base / WEIGHTS)
    with pytest.raises(UserError, match=rf"tensor {UP} has weights that are not finite"):
        open_model(str(base), devices=one_device())


@pytest.mark.parametrize("files", [WEIGHTS, "tokenizer.json", "tokenizer_config.json"])
def test_pointers_of_git_lfs(base, files):
    (base / files).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{files}: is a pointer of git-lfs .*git lfs pull"):
        open_model(str(base), devices=one_device())


def test_a_checkpoint_without_prefix(base, chats, tmp_path):
    """A checkpoint of the model class without ``lm_head`` loads; its export has the usual names and class."""
    expected = opened_logits(base)
    tensors = {name.removeprefix("model."): x for name, x in load_file(base / WEIGHTS).items()}
    save_file(tensors, base / WEIGHTS)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    np.testing.assert_array_equal(opened_logits(base), expected)
    train(run_config(base, chats, tmp_path / "run", training__max_steps=1), one_device())
    export(tmp_path / "run", tmp_path / "merged", "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    np.testing.assert_allclose(opened_logits(tmp_path / "merged"), logits(run_model(tmp_path / "run"), IDS), atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_shards_without_an_index(base, count):
    expected = opened_logits(base)
    tensors = sorted(load_file(base / WEIGHTS).items())
    (base / WEIGHTS).unlink()
    for i in range(count):
        save_file(dict(tensors[i::count]), base / f"model-{i + 1:05d}-of-00003.safetensors")
    np.testing.assert_array_equal(opened_logits(base), expected)
    (base / "model-00001-of-00003.safetensors").unlink()
    words = "no model.safetensors" if count == 1 else "is missing; the files have"
    with pytest.raises(UserError, match=words):
        open_model(str(base), devices=one_device())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_not_opened(base, name):
    (base / WEIGHTS).unlink()
    (base / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match=rf"{name} is a pickle, which could run code .*save_pretrained\(OUT\)"):
        open_model(str(base), devices=one_device())


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "gptq", None])
def test_the_error_for_quantized_checkpoints_names_a_fix(base, method):
    config = json.loads((base / "config.json").read_text())
    quantization = {"bits": 4} | ({"quant_method": method} if method else {})
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(UserError, match=rf"\({method or 'unknown method'}\) are not supported; .*nf4 .*--base"):
        read_architecture(base)


def test_the_error_for_unsupported_adapter_options_names_a_fix(base, chats, tmp_path):
    train(run_config(base, chats, tmp_path / "run", training__max_steps=1), one_device())
    export(tmp_path / "run", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for change in ({"use_qalora": True}, {"target_modules": "all-linear"}, {"init_lora_weights": "pissa"}):
        path.write_text(json.dumps(config | change))
        done = sft_jax("generate", tmp_path / "adapter", "--prompt", "river")
        assert done.returncode == 2
        assert "merge it into its base with PEFT" in done.stderr


def test_template_arguments_that_are_refused(base):
    for kwargs, words in (
        ({"enable_thinking": False}, "reads no argument 'enable_thinking'"),
        ({"messages": []}, "'messages' is set by the renderer"),
    ):
        with pytest.raises(UserError, match=words):
            load_tokenizer(base, template_kwargs=kwargs)
