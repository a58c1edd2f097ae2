"""Every method of adapters against PEFT: an adapter trained here, opened there, merged, and continued here."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from kit import load_model, logits, one_device, run_config, run_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sft_jax.adapters.attach import methods
from sft_jax.adapters.lora import LoRA
from sft_jax.assembly import open_model
from sft_jax.config import LoraConfig
from sft_jax.hf.config import read_architecture
from sft_jax.hf.reader import TensorReader
from sft_jax.run.export import export
from sft_jax.run.train import train
from sft_jax.sharding import make_mesh
from sft_jax.training.losses import batch_loss
from sft_jax.training.weights import build, load_weights
from sft_jax.tree import flatten
from sft_jax.typing import Batch

METHODS = {"lora": {}, "dora": {"use_dora": True}}


def test_the_table_has_every_method():
    assert METHODS.keys() == methods().keys()
    assert all(settings == methods()[name].PEFT for name, settings in METHODS.items())


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def run(tiny, chats, method, tmp_path_factory):
    """A run of a method, with its adapter beside it."""
    folder = tmp_path_factory.mktemp(method)
    train(run_config(tiny, chats, folder / "run", **settings_of(method)), one_device())
    export(folder / "run", folder / "adapter")
    return folder / "run"


def test_it_is_called_by_its_name(run, method):
    """In what commands say of a run, and on the model card."""
    name = methods()[method].__name__
    assert f"at step 4, {name} of" in open_model(str(run)).description
    assert f"| method | {name}, rank" in (run.parent / "adapter" / "README.md").read_text()


def settings_of(method):
    return {"lora__method": method, "optimizer__learning_rate": 0.02, "training__max_steps": 4}


def test_run_adapter_and_merged_agree(run, method, tiny, chats, tmp_path):
    """The run's own logits, PEFT's with the adapter, transformers' with the merged model; and one more run from it."""
    adapter = run.parent / "adapter"
    ids = np.random.default_rng(0).integers(3, 380, (2, 40))
    expected = logits(run_model(run), ids)
    base, *_ = load_model(tiny)
    assert np.abs(logits(base, ids) - expected).max() > 0.05

    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config.items() >= METHODS[method].items()
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), adapter).eval()
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(ids)).logits.numpy(), expected, atol=1e-4, rtol=0)

    export(run, tmp_path / "merged", "merged")
    merged, *_ = load_model(tmp_path / "merged")
    np.testing.assert_allclose(logits(merged, ids), expected, atol=1e-4, rtol=0)

    again = {"lora__init_from": str(adapter), "training__max_steps": 1, "optimizer__learning_rate": 0.0}
    train(run_config(tiny, chats, tmp_path / "again", **(settings_of(method) | again)), one_device())
    np.testing.assert_allclose(logits(run_model(tmp_path / "again"), ids), expected, atol=1e-5, rtol=0)


class Halves(torch.nn.Module):
    """In place of dropout: no chance in it, so that both sides do the same."""

    def forward(self, x):
        return 0.5 * x


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_peft(run, method, tiny, dropout, monkeypatch):
    """Of every parameter of a trained adapter, with dropout where PEFT has it."""
    adapter = run.parent / "adapter"
    ids = np.random.default_rng(1).integers(3, 380, (1, 33)).astype(np.int32)

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), adapter, is_trainable=True).train()
    if dropout:
        for module in theirs.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = Halves()
    found = theirs(torch.tensor(ids[:, :-1], dtype=torch.long)).logits[0]
    torch.nn.functional.cross_entropy(found, torch.tensor(ids[0, 1:], dtype=torch.long), reduction="sum").backward()
    expected = {
        name.replace(".default", "").removeprefix("base_model.model."): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }

    monkeypatch.setattr(LoRA, "apply_dropout", lambda self, x, key: x * 0.5)
    lora = LoraConfig(method=method, rank=4, alpha=8, dropout=dropout, init_from=str(adapter))
    split = build(read_architecture(tiny), make_mesh(devices=one_device()), lora, "float32")
    params, frozen = load_weights(split, TensorReader(tiny), lora)
    row = jnp.asarray(ids)
    batch = Batch(
        row[:, :-1], row[:, 1:], jnp.ones((1, 32)), jnp.ones((1, 32), jnp.int32), jnp.arange(32, dtype=jnp.int32)[None]
    )
    key = jax.random.key(0) if dropout else None
    grads = jax.jit(jax.grad(lambda one: batch_loss(split.merge(one, frozen), batch, key)["loss"]))(params)
    assert len(expected) == sum(len(split.stored[path].names) for path in flatten(grads))
    for path, leaf in flatten(grads).items():
        stored = split.stored[path]
        for number, name in enumerate(stored.names):
            ours = np.asarray(leaf[stored.index(number)])
            other = expected[name] if name in expected else expected[f"{name}.weight"]
            np.testing.assert_allclose(ours.T if stored.transposed else ours, other, atol=2e-5, rtol=1e-3)
