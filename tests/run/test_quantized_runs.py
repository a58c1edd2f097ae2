"""Whole runs on a quantized base, and the commands that open them."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from kit import conversations, losses, make_model, one_device, run_config, write_jsonl
from safetensors.numpy import load_file

from sft_jax.assembly import open_model
from sft_jax.config import MeshConfig, SourceConfig
from sft_jax.evaluation.score import score
from sft_jax.run.evaluate import evaluate
from sft_jax.run.export import export
from sft_jax.run.train import train
from sft_jax.tree import flatten

METHODS = pytest.mark.parametrize("method", ["nf4", "int8"])


@METHODS
def test_a_run_on_eight_devices_is_a_run_on_one(chats, tmp_path, method):
    sizes = {"hidden_size": 192, "intermediate_size": 320, "head_dim": 48}
    base = make_model(tmp_path / "base", tie_word_embeddings=False, **sizes)

    def run(name, devices=None, **changes):
        config = run_config(base, chats, tmp_path / name, model__quantization=method, training__batch_size=8, **changes)
        train(config, devices)
        return losses(tmp_path / name)

    one = run("one", one_device())
    np.testing.assert_allclose(run("eight", mesh=MeshConfig(data=2, fsdp=2, tensor=2)), one, rtol=1e-5)
    assert one[-1] < one[0]


@METHODS
def test_commands_on_a_quantized_run(tiny, chats, tmp_path, capsys, method):
    """Training, resuming, evaluation, scoring and generation use the same quantized base."""
    held_out = write_jsonl(tmp_path / "held_out.jsonl", conversations(6, seed=9))
    changes = {
        "model__quantization": method,
        "data__eval": [SourceConfig(path=str(held_out))],
        "training__save_every": 3,
        "evaluation__max_new_tokens": 4,
    }
    run, whole = tmp_path / "run", tmp_path / "whole"
    last = train(run_config(tiny, chats, run, training__max_steps=6, **changes), one_device())
    printed = capsys.readouterr().err
    assert re.search(
        rf"base  {method} in blocks of 48( and 56)?( and 112)? inputs, embed_tokens int8: [\d.]+ MB, 0\.\d\d", printed
    )
    train(run_config(tiny, chats, whole, training__max_steps=6, **changes), one_device())
    for step in (run / "checkpoints").iterdir():
        if step.name == "6":
            step.rename(tmp_path / "later")
    train(run_config(tiny, chats, run, training__max_steps=6, **changes), one_device())
    assert losses(run) == losses(whole)

    summary = evaluate(run_config(tiny, chats, run, **changes), devices=one_device()).summary
    assert summary["tuned"]["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    opened = open_model(str(run), devices=one_device())
    assert f"base in {method}" in opened.description
    leaves = flatten(opened.frozen)
    assert leaves["layers", "0", "mlp", "up_proj", "weight", "codes"].dtype == ("uint8" if method == "nf4" else "int8")
    rows = [{"prompt": "seven river", "responses": ["bridge", "market garden"]}]
    assert all(np.isfinite(one.log_likelihood) for one in score(opened, rows))
    assert len(opened.generator(opened.params, opened.frozen, [[5, 6, 7]], 4)[0].ids) <= 4


@METHODS
def test_exports_match_the_unquantized_base(tiny, chats, tmp_path, method):
    torch = pytest.importorskip("torch")
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    train(run_config(tiny, chats, run, model__quantization=method), one_device())
    export(run, tmp_path / "adapter")
    export(run, tmp_path / "merged", "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny, tmp_path / "merged"))
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, weight in after.items():
        update = 0.0
        if f"base_model.model.{name[:-7]}.lora_A.weight" in adapter:
            a, b = (adapter[f"base_model.model.{name[:-7]}.lora_{x}.weight"] for x in "AB")
            update = 2.0 * b @ a
            assert np.abs(update).max() > 0
        np.testing.assert_allclose(weight, before[name] + update, atol=1e-6, err_msg=name)
    ids = torch.tensor(np.random.default_rng(0).integers(0, 380, (2, 60)))
    with torch.no_grad():
        logits = [
            load.from_pretrained(tmp_path / name).eval()(ids).logits.numpy()
            for load, name in ((AutoPeftModelForCausalLM, "adapter"), (AutoModelForCausalLM, "merged"))
        ]
    np.testing.assert_allclose(*logits, atol=1e-4)
    assert f"base quantized to {method}" in (tmp_path / "merged" / "README.md").read_text()


@METHODS
def test_trained_embeddings_are_not_quantized(tiny, chats, tmp_path, capsys, method):
    changes = {"model__quantization": method, "data__added_tokens": ["<|new|>"]}
    train(run_config(tiny, chats, tmp_path / "run", **changes), one_device())
    assert "embeddings not quantized because they are trained" in capsys.readouterr().err
    opened = open_model(str(tmp_path / "run"), devices=one_device())
    assert ("embed_tokens", "weight") not in opened.split.quantized
    assert flatten(opened.params)["embed_tokens", "weight"].dtype == jnp.float32
    assert opened.network().head().vocab_size == 385
    export(tmp_path / "run", tmp_path / "adapter")
    with_adapter = open_model(str(tmp_path / "adapter"), devices=one_device())
    assert with_adapter.arch.vocab_size == 385
