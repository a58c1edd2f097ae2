"""``sft-jax check`` proves an import, ``export --check`` an export, and both say what is wrong or not checked."""

import json
import re
import shutil
import sys
import warnings

import families
import ml_dtypes
import numpy as np
import pytest
import torch
from kit import CHATML, ROOT, make_tokenizer, one_device, run_config, sft_jax
from safetensors.numpy import load_file, save_file

import sft_jax as api
from sft_jax.assembly import find, open_base
from sft_jax.checking import logits as compared
from sft_jax.checking.chat import check_chat
from sft_jax.checking.files import check_bytes, too_large
from sft_jax.checking.logits import Difference, Measured, check_greedy, difference, sample_ids
from sft_jax.checking.reference import open_reference
from sft_jax.run.export import export
from sft_jax.run.train import train

NAMES = ["architecture", "tensors", "round trip", "logits", "packed", "greedy text", "chat template"]


def checked(model, code=0, *options):
    """The results of a check by name, from the JSON of the command line."""
    done = sft_jax("check", model, "--json", *options)
    assert done.returncode == code, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] == (code == 0)
    return {one["name"]: one for one in report["checks"]}


def statuses(results):
    return {name: one["status"] for name, one in results.items()}


def random_model(name, folder, monkeypatch):
    """A random model of a row of the families, with a tokenizer and few layers."""
    kind, changes = families.FAMILIES[name]
    if name == "gemma3_text":
        changes = changes | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    monkeypatch.setitem(families.FAMILIES, name, (kind, changes))
    monkeypatch.setitem(families.SHAPE, "vocab_size", 384)
    families.reference(name, folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["llama3", "gemma3_text"])
def test_an_import_that_is_right(name, tmp_path, monkeypatch):
    results = checked(random_model(name, tmp_path, monkeypatch))
    assert statuses(results) == dict.fromkeys(NAMES, "ok")
    assert results["tensors"]["num_present"] == results["tensors"]["num_in_files"]
    assert 0 < results["logits"]["largest_difference"] < 1e-4
    assert "beside transformers" in results["logits"]["details"]
    assert "same by transformers" in results["greedy text"]["details"]
    assert "not reached" not in results["logits"]["details"]  # the window of Gemma is 9 tokens


def test_damaged_files(tiny, tmp_path):
    def broken(name, edit):
        shutil.copytree(tiny, tmp_path / name)
        tensors = load_file(tiny / "model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / name / "model.safetensors")
        return tmp_path / name

    weight = "model.layers.1.mlp.up_proj.weight"

    def rename(tensors):
        tensors["model.layers.1.mlp.up_projection.weight"] = tensors.pop(weight)

    results = checked(broken("renamed", rename), 1)
    assert statuses(results) == dict.fromkeys(NAMES, "not checked") | {
        "architecture": "ok", "tensors": "FAILED", "chat template": "ok"
    }  # fmt: skip
    details = results["tensors"]["details"]
    assert f"missing: {weight}" in details
    assert "without a place: model.layers.1.mlp.up_projection.weight" in details
    results = checked(broken("transposed", lambda tensors: tensors.update({weight: tensors[weight].T.copy()})), 1)
    assert f"of another shape: {weight}" in results["tensors"]["details"]
    results = checked(broken("nan", lambda tensors: tensors[weight].__setitem__((0, 0), np.nan)), 1)
    assert (results["round trip"]["status"], results["logits"]["status"]) == ("FAILED", "FAILED")
    assert "not finite" in results["round trip"]["details"]

    def wide(tensors):
        tensors[weight] = tensors[weight].astype(np.float64)
        tensors[weight][0, 0] = 0.1  # no float32

    result = check_bytes(open_base(str(broken("float64", wide))))
    assert result.status == "FAILED"
    assert result.details.endswith(f"other bytes in {weight}")


def test_what_cannot_be_opened(tiny, tmp_path):
    for arguments, words in (((tmp_path,), "this folder holds neither"), ((tiny, "--base", "x"), "leave out --base")):
        done = sft_jax("check", *arguments)
        assert done.returncode == 2
        assert words in done.stderr


def test_a_network_that_reads_its_config_wrong(tiny, tmp_path):
    """Right weights with a rotary base or an epsilon that is a little off do not pass as the reference's."""
    reference = open_reference(tiny)
    for key, value in {"rope_theta": 11000.0, "rms_norm_eps": 2e-4}.items():
        folder = tmp_path / key
        shutil.copytree(tiny, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        found = find(str(folder), dtype="float32", devices=one_device())
        texts = sample_ids(found.tokenizer, found.split.arch)
        assert not difference(compared.logits(found.load(), texts), reference.logits(texts)).agrees, key


def test_the_criterion():
    big = [np.array([[50.0, -100.0]])]
    assert difference([big[0] + 0.09], big).agrees
    assert not difference([big[0] + 0.11], big).agrees
    assert difference([np.array([[0.0009]])], [np.array([[0.0]])]).agrees
    assert not difference([np.array([[np.nan]])], [np.array([[0.0]])]).agrees
    assert not difference([np.zeros((2, 3)), np.full((1, 1), np.nan)], [np.zeros((2, 3)), np.zeros((1, 1))]).agrees
    assert not difference([np.zeros((2, 3))], [np.zeros((2, 4))]).agrees
    assert Difference(0.0, 0.5).limit == compared.TOLERANCE
    assert too_large(3e9, 2e9) == "needs about 3.0 GB of memory, 2.0 GB available"
    assert too_large(3e9, None) is None


@pytest.mark.parametrize(
    ("generated", "theirs", "status", "words"),
    [
        ([1, 2], [1, 2], "ok", "the same without a cache, the same by other"),
        ([1, 2], [1, 3], "ok", "token 2 is another, as likely as ours"),
        ([1, 2], [0, 2], "FAILED", "token 1 is another, less likely"),
        ([1, 2], [1], "FAILED", "1 tokens by other"),
        ([1, 0], None, "FAILED", "without a cache, token 2 is another; not compared with another library: other"),
        ([1, 2], None, "ok", "the same without a cache; not compared with another library: other"),
    ],
)
def test_greedy_tokens(generated, theirs, status, words):
    """Token 1 is the most likely first; then 2 and 3 are equally likely."""
    rows = np.array([[0.0, 5, 0, 0], [0.0, 0, 5, 5]])
    result = check_greedy(Measured([], rows, generated, rows), theirs, "other")
    assert result.status == status
    assert words in result.details


def test_the_end_of_a_turn():
    """A base model may learn its stop token; what was tuned has to have it."""
    tokenizer = make_tokenizer()  # a turn ends with token 2
    for stop_ids, is_tuned, status, words in (
        ([0, 2], True, "ok", "a turn ends with '<|im_end|>', a stop token of generation"),
        ([0, 999], False, "ok", "stops at '<|endoftext|>', the unknown id 999 until the model is tuned"),
        ([0], True, "FAILED", "a turn ends with '<|im_end|>', but generation stops at '<|endoftext|>'"),
        ([], True, "FAILED", "generation stops at no token"),
    ):
        result = check_chat(tokenizer, stop_ids, is_tuned)
        assert result.status == status
        assert words in result.details
    with pytest.MonkeyPatch.context() as patch:  # other tests have the same tokenizer
        patch.setattr(tokenizer, "chat_template", CHATML.replace("<|im_end|>", ""))
        assert "does not end with a stop token" in check_chat(tokenizer, [2], False).details
        patch.setattr(tokenizer, "chat_template", None)
        assert check_chat(tokenizer, [2], False).status == "not checked"


def test_without_torch_and_without_memory(tiny, tmp_path, monkeypatch, capsys):
    def without_torch(*folders):  # transformers itself, which is imported, needs it elsewhere
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "torch", None)
            return open_reference(*folders)

    monkeypatch.setattr("sft_jax.run.check.open_reference", without_torch)
    report = api.check(tiny)
    assert report["passed"]
    lines = {line[:13].strip(): line[15:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert [*lines] == NAMES
    assert lines["logits"].split(maxsplit=2) == ["not", "checked", "torch is not installed"]
    assert lines["packed"].startswith("ok")
    assert "the same without a cache; not compared with another library: torch is" in lines["greedy text"]
    monkeypatch.setattr("sft_jax.run.check.free_bytes", lambda device: 1000)
    results = checked(tiny)
    assert [results[name]["status"] for name in ("round trip", "logits", "packed", "greedy text")] == [
        "ok", "not checked", "not checked", "not checked"
    ]  # fmt: skip
    assert "GB available" in results["packed"]["details"]


@pytest.fixture(scope="module")
def lora_run(tiny, chats, tmp_path_factory):
    """A run on a base model in bfloat16."""
    folder = tmp_path_factory.mktemp("lora")
    shutil.copytree(tiny, folder / "base")
    tensors = load_file(tiny / "model.safetensors")
    save_file({k: x.astype(ml_dtypes.bfloat16) for k, x in tensors.items()}, folder / "base" / "model.safetensors")
    train(run_config(folder / "base", chats, folder / "run", training__max_steps=4), one_device())
    return folder / "run"


def test_a_run_and_its_exports(lora_run, tmp_path):
    results = checked(lora_run)
    assert statuses(results) == dict.fromkeys(NAMES, "ok")
    assert "beside PEFT" in results["logits"]["details"]
    for form in ("adapter", "merged"):
        done = sft_jax("export", lora_run, tmp_path / form, "--format", form, "--check")
        assert done.returncode == 0, done.stdout + done.stderr
        assert [line[:13].strip() for line in done.stdout.splitlines()[-3:]] == ["written", "logits", "chat template"]
        assert "FAILED" not in done.stdout
        assert "not checked" not in done.stdout
        assert ("rounding moved logits" in done.stdout) == (form == "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert statuses(checked(tmp_path / "adapter")) == dict.fromkeys([*NAMES, "adapter"], "ok")


@pytest.mark.parametrize("changes", [{"lora__train_embeddings": True}, {"lora": None}], ids=["embeddings", "full"])
def test_an_export_with_trained_weights_in_bfloat16(lora_run, chats, tmp_path, changes):
    """What is rounded is rounded alike in the files and in the check."""
    config = run_config(lora_run.parent / "base", chats, tmp_path / "run", training__max_steps=4, **changes)
    train(config, one_device())
    done = sft_jax("export", tmp_path / "run", tmp_path / "out", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest difference 0," in done.stdout
    assert "rounding moved logits" in done.stdout


def test_an_export_that_is_not_the_run(lora_run, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def damaged(*arguments):
        form = export(*arguments)
        tensors = load_file(out / "adapter_model.safetensors")
        name = next(name for name in tensors if "lora_B" in name)
        tensors[name] = tensors[name] * np.float32(1.5)
        metadata = {"format": "pt"}
        save_file(tensors, out / "adapter_model.safetensors", metadata)
        return form

    monkeypatch.setattr("sft_jax.run.export.export", damaged)
    done = sft_jax("export", lora_run, out, "--check")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"sft-jax: {out}: is not what {lora_run} computes, but stays there")
    assert (out / "adapter_model.safetensors").is_file()
    assert "written: adapter in float32, loaded again, beside" in done.stderr
    done = sft_jax("export", lora_run, "gs://bucket/out", "--check")
    assert done.returncode == 2
    assert "--check: needs a local folder" in done.stderr


def test_torch_is_imported_by_these_commands_only(monkeypatch):
    files = [
        path
        for path in (ROOT / "sft_jax").rglob("*.py")
        if re.search(r"^ *(import|from) torch\b", path.read_text(), re.M)
    ]
    assert [path.relative_to(ROOT / "sft_jax").as_posix() for path in files] == ["checking/reference.py"]
    from sft_jax.without_torch import bring_back_torch, leave_out_torch

    assert torch
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.delitem(sys.modules, "torch")
    leave_out_torch()
    assert sys.modules["torch"] is None
    bring_back_torch()
    assert "torch" not in sys.modules
