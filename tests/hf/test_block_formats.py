"""Published checkpoints in FP8 or MXFP4 blocks: the values of transformers, the weights of a bfloat16 twin."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from kit import logits, make_model, one_device, run_config, run_model
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from sft_jax.assembly import open_model
from sft_jax.errors import UserError
from sft_jax.hf.dequantized import open_weights
from sft_jax.hf.reader import TensorReader, chunks
from sft_jax.run.export import export
from sft_jax.run.train import train

IDS = np.random.default_rng(0).integers(0, 380, (2, 40))
BLOCK = (8, 16)  # divides the sizes of the tiny model, as transformers requires
FP8 = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic", "fmt": "e4m3"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
UP = "model.layers.1.mlp.up_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def to_fp8(weight: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of ``weight [out, in]``: each block is divided by its scale, which maps its largest to 448."""
    rows, columns = BLOCK
    scales = np.empty((-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)), np.float32)
    codes = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    for i, j in np.ndindex(*scales.shape):
        at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
        scales[i, j] = np.abs(weight[at]).max() / 448
        codes[at] = (weight[at] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
    return torch.tensor(codes.view(np.uint8)).view(torch.float8_e4m3fn), torch.tensor(scales)


def quantize(folder):
    """Quantizes the projections of a model to FP8; the other tensors become bfloat16."""
    tensors = {}
    for name, x in load_file(folder / "model.safetensors").items():
        if "_proj.weight" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(x)
        else:
            tensors[name] = torch.tensor(x).to(torch.bfloat16)
    return written(folder, tensors, FP8)


def written(folder, tensors, quantization):
    """Writes tensors, and the quantization to the config."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {"model_type": "llama"}
    path.write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


def tensors_of(folder):
    return load_torch_file(folder / "model.safetensors")


def to_bits(x) -> np.ndarray:
    """The bits of a bfloat16 array."""
    return x.view(torch.uint16).numpy() if isinstance(x, torch.Tensor) else x.view(np.uint16)


def experts(num_experts=3, out_dim=10, in_dim=64, exponents=(110, 130)):
    """Random codes and scales of experts ``[E, in, out]``, and their biases."""
    rng = np.random.default_rng(0)
    return {
        f"{EXPERTS}_blocks": torch.tensor(rng.integers(0, 256, (num_experts, out_dim, in_dim // 32, 16), np.uint8)),
        f"{EXPERTS}_scales": torch.tensor(rng.integers(*exponents, (num_experts, out_dim, in_dim // 32), np.uint8)),
        f"{EXPERTS}_bias": torch.zeros(num_experts, out_dim, dtype=torch.bfloat16),
    }


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def base(request, tmp_path_factory):
    names = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    folder = tmp_path_factory.mktemp(request.param) / "base"
    return quantize(make_model(folder, model_type=request.param, architectures=[names[request.param]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_that_of_transformers(tmp_path, dtype):
    """Scales may be float32 or bfloat16."""
    codes, scales = to_fp8(np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32))
    scales = scales.to(dtype)
    reader = open_weights(written(tmp_path, {UP: codes, f"{UP}_scale_inv": scales}, FP8))
    theirs = Fp8Dequantize(None).convert({"weight": codes, "weight_scale_inv": scales})["weight"]
    np.testing.assert_array_equal(to_bits(reader.read(UP)), to_bits(theirs.to(torch.bfloat16)))


def test_fp8_blocks_at_the_end_are_smaller(tmp_path):
    """Rows by range, aligned to blocks or not, equal those of the whole."""
    codes, scales = to_fp8(np.random.default_rng(0).normal(size=(21, 45)).astype(np.float32))
    reader = open_weights(written(tmp_path, {UP: codes, f"{UP}_scale_inv": scales}, FP8))
    factors = np.repeat(np.repeat(scales.numpy(), BLOCK[0], 0), BLOCK[1], 1)[:21, :45]
    whole = reader.read(UP)
    np.testing.assert_array_equal(whole, (codes.float().numpy() * factors).astype(ml_dtypes.bfloat16))
    for start, stop in [(0, 8), (3, 5), (7, 9), (8, 21), (20, 21), (0, 21), (5, 5)]:
        np.testing.assert_array_equal(reader.read(UP, start, stop), whole[start:stop])
    assert (reader.names, reader.shape(UP), reader.dtype(UP)) == ({UP}, (21, 45), ml_dtypes.bfloat16)


@pytest.mark.parametrize("exponents", [(110, 130), (1, 120)])
def test_mxfp4_is_that_of_transformers(tmp_path, exponents):
    tensors = experts(exponents=exponents)
    reader = open_weights(written(tmp_path, tensors, MXFP4))
    blocks, scales = tensors[f"{EXPERTS}_blocks"], tensors[f"{EXPERTS}_scales"]
    theirs = convert_moe_packed_tensors(blocks, scales)
    np.testing.assert_array_equal(to_bits(reader.read(EXPERTS)), to_bits(theirs))
    np.testing.assert_array_equal(reader.read(EXPERTS, 1, 2), reader.read(EXPERTS)[1:2])
    assert reader.names == {EXPERTS, f"{EXPERTS}_bias"}
    assert (reader.shape(EXPERTS), reader.dtype(EXPERTS)) == ((3, 64, 10), ml_dtypes.bfloat16)


def test_mxfp4_example_of_the_docstring(tmp_path):
    tensors = experts(1, 1, 32)
    tensors[f"{EXPERTS}_blocks"][:], tensors[f"{EXPERTS}_scales"][:] = 0x52, 128
    reader = open_weights(written(tmp_path, tensors, MXFP4))
    np.testing.assert_array_equal(reader.read(EXPERTS)[0, :4, 0].astype(np.float32), [2, 6, 2, 6])


def test_only_codes_and_scales_of_the_rows_are_read(tmp_path, monkeypatch):
    """Rows 7 … 8 of FP8 lie in two rows of blocks; a chunk of MXFP4 is an expert here."""
    codes, scales = to_fp8(np.random.default_rng(0).normal(size=(24, 48)).astype(np.float32))
    fp8 = open_weights(written(tmp_path / "fp8", {UP: codes, f"{UP}_scale_inv": scales}, FP8))
    mxfp4 = open_weights(written(tmp_path / "mxfp4", experts(4), MXFP4))
    sizes, original = [], TensorReader._bytes
    monkeypatch.setattr(TensorReader, "_bytes", lambda *args: (lambda x: sizes.append(x.size) or x)(original(*args)))
    fp8.read(UP, 7, 9)
    assert sizes == [2 * 48, 2 * 3 * 4]
    sizes.clear()
    monkeypatch.setattr("sft_jax.hf.reader.CHUNK_BYTES", 64 * 10 * 2)
    assert [start for start, _ in chunks(mxfp4, EXPERTS)] == [0, 1, 2, 3]
    assert sizes == [10 * 2 * 16, 10 * 2] * 4


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_the_fingerprint_is_that_of_the_files(base, tmp_path):
    reader, copy = open_weights(base), shutil.copytree(base, tmp_path / "copy")
    assert open_weights(copy).fingerprint() == reader.fingerprint()
    tensors = tensors_of(copy)
    tensors[f"{UP}_scale_inv"][0, 0] *= 2
    assert open_weights(written(copy, tensors, FP8)).fingerprint() != reader.fingerprint()


def twin_of(base, folder):
    """The same model with dequantized tensors in bfloat16, and a config without quantization."""
    shutil.copytree(base, folder)
    tensors = tensors_of(base)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        codes, scales = name.removesuffix("_scale_inv"), tensors.pop(name)
        factors = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
        tensors[codes] = (tensors[codes].float() * factors).to(torch.bfloat16)
    return written(folder, tensors, None)


def test_a_run_is_that_of_its_twin(base, chats, tmp_path, capsys):
    """A quantized base has the logits of its bfloat16 twin; so has the merged export, in transformers too."""
    twin = twin_of(base, tmp_path / "twin")
    models = [open_model(str(folder), devices=one_device()) for folder in (base, twin)]
    np.testing.assert_array_equal(*(logits(model.network(), IDS) for model in models))
    np.testing.assert_allclose(torch_logits(base), logits(models[0].network(), IDS), atol=1e-4, rtol=0)
    last = [
        train(run_config(folder, chats, tmp_path / f"{folder.name}-run", training__max_steps=2), one_device())["loss"]
        for folder in (base, twin)
    ]
    assert last[0] == last[1]
    capsys.readouterr()
    for form in ("adapter", "merged"):
        export(tmp_path / "base-run", tmp_path / form, form)
        assert ("the base is stored in fp8; the export is bfloat16" in capsys.readouterr().out) == (form == "merged")
    export(tmp_path / "twin-run", tmp_path / "merged-twin", "merged")
    before, merged, expected = (tensors_of(folder) for folder in (twin, tmp_path / "merged", tmp_path / "merged-twin"))
    assert merged.keys() == expected.keys()
    assert all(x.dtype == torch.bfloat16 and torch.equal(x, expected[name]) for name, x in merged.items())
    assert not torch.equal(merged[UP], before[UP])
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    tuned = open_model(str(tmp_path / "merged"), devices=one_device())
    np.testing.assert_allclose(torch_logits(tmp_path / "merged"), logits(tuned.network(), IDS), atol=1e-4, rtol=0)
    with_adapter = open_model(str(tmp_path / "adapter"), devices=one_device())
    np.testing.assert_array_equal(logits(with_adapter.network(), IDS), logits(run_model(tmp_path / "base-run"), IDS))


def torch_logits(folder):
    """Logits in float32 of the weights in bfloat16, to which transformers dequantizes FP8 where there is no GPU."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model.float().eval()(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_an_untrained_export_holds_the_values_of_the_base(base, chats, tmp_path):
    train(run_config(base, chats, tmp_path / "run", lora=None, training__max_steps=0), one_device())
    export(tmp_path / "run", tmp_path / "out")
    before, after = open_weights(base), TensorReader(tmp_path / "out")
    assert before.names == after.names
    assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in before.names)


def without(name):
    return lambda tensors: tensors.pop(name)


def changed(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


SCALES = f"{UP}_scale_inv"
BLOCKS, EXPERT_SCALES = f"{EXPERTS}_blocks", f"{EXPERTS}_scales"


@pytest.mark.parametrize(
    ("quantization", "change", "words"),
    [
        (FP8, without(SCALES), rf"{SCALES} is missing; it has the scales of {UP}$"),
        (FP8, without(UP), rf"{SCALES} has no tensor {UP} of dtype F8_E4M3 beside it"),
        (FP8, changed(UP, torch.Tensor.bfloat16), rf"{SCALES} has no tensor {UP} of dtype F8_E4M3 beside it"),
        (FP8, changed(SCALES, lambda x: x[:, :1]), rf"{SCALES} has shape \(14, 1\), but {UP} implies \(14, 3\)"),
        (FP8, changed(SCALES, lambda x: x.to(torch.float8_e8m0fnu)), rf"{SCALES} has dtype F8_E8M0; supported are F32"),
        (FP8, changed(SCALES, lambda x: x * torch.nan), rf"{SCALES} has scales that are not finite"),
        (FP8, changed(SCALES, lambda x: x * torch.inf), rf"{SCALES} has scales that are not finite"),
        (FP8, changed(UP, lambda x: x[None]), rf"{UP} has shape \(1, 112, 48\), but this is no shape of fp8 codes"),
        (FP8, changed(UP, lambda x: (x.view(torch.uint8) | 127).view(x.dtype)), rf"{UP} has weights that are not fin"),
        (FP8, changed("model.norm.weight", torch.Tensor.byte), r"model.norm.weight has dtype U8; supported are F32"),
        (None, lambda _: None, r"has dtype F8_E4M3; supported are F32"),
        (FP8 | {"weight_block_size": None}, lambda _: None, r"config.json: .*\(fp8 with weight_block_size None .*nf4"),
        (FP8 | {"activation_scheme": "static"}, lambda _: None, r"activation_scheme static\) are not supported; .*nf4"),
        ({"quant_method": "gptq"}, lambda _: None, r"config.json: .*\(gptq\) are not supported; .*use the original"),
        ("4 bits", lambda _: None, r"\(unknown method\) are not supported"),
    ],
)
def test_checkpoints_that_cannot_be_read(tmp_path, quantization, change, words):
    base = quantize(make_model(tmp_path / "base", num_hidden_layers=2))
    tensors = tensors_of(base)
    change(tensors)
    written(base, {name: x.contiguous() for name, x in tensors.items()}, quantization)
    with pytest.raises(UserError, match=words):
        open_model(str(base), devices=one_device())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(EXPERT_SCALES), rf"{EXPERT_SCALES} is missing"),
        (without(BLOCKS), rf"{EXPERT_SCALES} has no tensor {BLOCKS} of dtype U8"),
        (changed(EXPERT_SCALES, lambda x: x[..., :1]), rf"{EXPERT_SCALES} has shape \(3, 10, 1\), but .* \(3, 10, 2\)"),
        (changed(EXPERT_SCALES, torch.Tensor.float), rf"{EXPERT_SCALES} has dtype F32; supported are U8"),
        (changed(EXPERT_SCALES, lambda x: x | 255), rf"{EXPERT_SCALES} has scales that are not finite"),
        (changed(BLOCKS, lambda x: x[..., :8]), rf"{BLOCKS} has shape .* no shape of mxfp4 codes"),
        (lambda x: x.update({EXPERTS: torch.zeros(3, 64, 10)}), rf"{EXPERTS} is stored twice, also as {BLOCKS}"),
    ],
)
def test_experts_that_cannot_be_read(tmp_path, change, words):
    tensors = experts()
    change(tensors)
    written(tmp_path, {name: x.contiguous() for name, x in tensors.items()}, MXFP4)
    with pytest.raises(UserError, match=words):
        open_weights(tmp_path).read(EXPERTS)


def test_codes_are_not_weights(tmp_path):
    """A tensor of bytes beside quantized experts stays refused."""
    reader = open_weights(written(tmp_path, experts() | {"mask": torch.zeros(4, dtype=torch.uint8)}, MXFP4))
    for call in (reader.read, reader.dtype):
        with pytest.raises(UserError, match="tensor mask has dtype U8; supported are F32"):
            call("mask")
    with pytest.raises(UserError, match="tensor mask has dtype U8"):
        reader.fingerprint()
