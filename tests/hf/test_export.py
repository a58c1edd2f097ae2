"""Exports compute the same as the run, in transformers and in PEFT."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from kit import CHATML, logits, make_model, one_device, run_config, run_model, sft_jax, write_jsonl
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_jax.assembly import open_model
from sft_jax.checking.written import merged
from sft_jax.errors import UserError
from sft_jax.hf.card import Exported, model_card
from sft_jax.run.export import export
from sft_jax.run.train import train
from sft_jax.tree import flatten

IDS = np.random.default_rng(0).integers(0, 380, (2, 60))


def torch_logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.numpy()


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp(request.param) / "base", tie_word_embeddings=request.param == "tied")


@pytest.fixture(scope="module")
def lora_run(base, chats):
    run = base.parent / "lora"
    train(run_config(base, chats, run, training__max_steps=8), one_device())
    return run


@pytest.fixture(scope="module")
def full_run(base, chats):
    run = base.parent / "full"
    train(run_config(base, chats, run, lora=None, training__max_steps=8), one_device())
    return run


def test_run_merged_and_adapter_agree(base, lora_run, tmp_path):
    export(lora_run, tmp_path / "merged", "merged")
    export(lora_run, tmp_path / "adapter")
    ours = logits(run_model(lora_run), IDS)
    merged = torch_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    untouched = AutoModelForCausalLM.from_pretrained(base)
    before = torch_logits(untouched)
    adapter = torch_logits(PeftModel.from_pretrained(untouched, tmp_path / "adapter"))
    auto = torch_logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"))
    assert np.abs(ours - before).max() > 0.1
    for other in (merged, adapter, auto):
        np.testing.assert_allclose(other, ours, atol=1e-4, rtol=0)


def test_full_run_and_export_agree(base, full_run, tmp_path):
    export(full_run, tmp_path / "tuned")
    ours = logits(run_model(full_run), IDS)
    np.testing.assert_allclose(
        torch_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")), ours, atol=1e-4, rtol=0
    )
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "tuned" / "model.safetensors")
    assert {name: x.shape for name, x in before.items()} == {name: x.shape for name, x in after.items()}
    assert not any(np.array_equal(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match="there is no adapter"):
        export(full_run, tmp_path / "adapter", "adapter")


def test_folder_has_all_that_inference_needs(base, lora_run, tmp_path):
    export(lora_run, tmp_path / "merged", "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == CHATML
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    export(lora_run, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "generation_config.json").read_text()) == generation
    card = (tmp_path / "merged" / "README.md").read_text()
    for words in ("`base`", "chats.jsonl", "every assistant turn", "LoRA, rank 4", "0.005", "training loss", "→"):
        assert words in card
    assert str(tmp_path) not in card
    before, after = (json.loads((f / "config.json").read_text()) for f in (base, tmp_path / "merged"))
    assert before == after


def test_card_names_ids_and_hides_paths(tmp_path):
    config = run_config("Qwen/Qwen3-0.6B", tmp_path / "secret" / "chats.jsonl", tmp_path)
    rows = [{"step": 1, "loss": 2.0}, {"step": 9, "loss": 1.0}]
    card = model_card(config, Exported("tuned", "adapter", 3, "bfloat16", metrics=rows))
    assert "base_model: Qwen/Qwen3-0.6B" in card
    assert "`chats.jsonl`" in card
    assert "secret" not in card
    assert "| training loss | 2.0000 → 2.0000 |" in card  # ignores rows after the exported step
    local = model_card(run_config(tmp_path, "org/data", tmp_path), Exported("tuned", "merged", 3, "bfloat16"))
    assert "base_model" not in local
    assert "`org/data`" in local
    assert "not measured" in local


@pytest.mark.parametrize("full", [False, True])
def test_untrained_export_is_byte_equal(base, chats, tmp_path, full):
    changes = {"lora": None} if full else {}
    train(run_config(base, chats, tmp_path / "run", training__max_steps=0, **changes), one_device())
    export(tmp_path / "run", tmp_path / "out", "merged")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_each_tensor_keeps_its_dtype(chats, tmp_path):
    """Norms in float32 and matrices in bfloat16, full fine-tuning."""
    base = make_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors = {name: x if x.ndim == 1 else x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    save_file(tensors, base / "model.safetensors")
    for steps in (0, 4):
        out = tmp_path / f"out{steps}"
        train(run_config(base, chats, tmp_path / f"run{steps}", lora=None, training__max_steps=steps), one_device())
        export(tmp_path / f"run{steps}", out)
        after = load_file(out / "model.safetensors")
        assert {name: x.dtype for name, x in after.items()} == {name: x.dtype for name, x in tensors.items()}
        assert all(after[name].tobytes() == tensors[name].tobytes() for name in tensors) == (steps == 0)


@pytest.mark.parametrize("form", ["full", "merged"])
def test_bfloat16_files_keep_small_changes(chats, tmp_path, form):
    """Each weight moves by less than half a step of bfloat16; rounded to nearest, hardly any would."""
    base = make_model(tmp_path / "base")
    before = {name: x.astype(ml_dtypes.bfloat16) for name, x in load_file(base / "model.safetensors").items()}
    save_file(before, base / "model.safetensors")
    changes = {"optimizer__learning_rate": 1e-5, "training__max_steps": 4} | ({"lora": None} if form == "full" else {})
    train(run_config(base, chats, tmp_path / "run", **changes), one_device())
    export(tmp_path / "run", tmp_path / "out", "merged")
    after = load_file(tmp_path / "out" / "model.safetensors")

    run = merged(open_model(str(tmp_path / "run"), dtype="float32"))
    moved = along = nearest = 0.0
    for path, leaf in (flatten(run.params) | flatten(run.frozen)).items():
        stored = run.split.stored[path]
        for number, name in enumerate(stored.names):
            exact, start = stored.tensor(np.asarray(leaf), number), before[name].astype(np.float32)
            change = exact - start
            moved += np.sum(change**2)
            along += np.sum(change * (after[name].astype(np.float32) - start))
            nearest += np.sum(change * (exact.astype(ml_dtypes.bfloat16).astype(np.float32) - start))
    assert nearest < 0.6 * moved
    assert along == pytest.approx(moved, rel=0.1)


@pytest.mark.parametrize("full", [False, True])
def test_added_tokens_resize_and_load(base, chats, tmp_path, full):
    template = tmp_path / "template.jinja"
    template.write_text(CHATML.replace("<|im_end|>", "<|done|>").replace("<|im_start|>", "<|begin|>"))
    config = run_config(
        base,
        chats,
        tmp_path / "run",
        data__chat_template=str(template),
        data__added_tokens=["<|begin|>", "<|done|>"],
        training__max_steps=8,
        **({"lora": None} if full else {}),
    )
    train(config, one_device())
    ours = logits(run_model(tmp_path / "run"), IDS)
    assert ours.shape[-1] == 386
    export(tmp_path / "run", tmp_path / "merged", "merged")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / "merged")]
    if not full:
        export(tmp_path / "run", tmp_path / "adapter")
        models.append(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"))
    for model in models:
        np.testing.assert_allclose(torch_logits(model), ours, atol=1e-4, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.convert_tokens_to_ids("<|done|>"), 2]
    # the added rows were told apart by training
    rows = load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"][384:]
    assert not np.array_equal(rows[0], rows[1])


def test_a_tokenizer_with_more_tokens_than_the_table(tmp_path, chats, capsys):
    """The table stays as it is, and the config says what the table has."""
    base = make_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    size = len(tokenizer)
    tokenizer.add_tokens(["<|never|>"], special_tokens=True)
    tokenizer.save_pretrained(base)
    train(run_config(base, chats, tmp_path / "run", training__max_steps=2), one_device())
    assert f"{size + 1:,} tokens, the model {size:,} embeddings" in capsys.readouterr().err
    export(tmp_path / "run", tmp_path / "merged", "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == size
    ours = logits(run_model(tmp_path / "run"), IDS)[..., :size]
    np.testing.assert_allclose(torch_logits(merged), ours, atol=1e-4, rtol=0)


def test_a_tied_model_with_a_copy_of_its_embeddings(tmp_path, chats):
    base = make_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, base / "model.safetensors")
    config = run_config(base, chats, tmp_path / "run", lora=None, data__added_tokens=["<|new|>"])
    train(config, one_device())
    export(tmp_path / "run", tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(tensors)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(torch_logits(model), logits(run_model(tmp_path / "run"), IDS), atol=1e-4, rtol=0)


def test_square_embeddings_grow_too(tmp_path, chats):
    """The vocabulary size equals the hidden size, so that the dimension to grow cannot be guessed from the shape."""
    base = make_model(tmp_path / "base", hidden_size=384, num_hidden_layers=1, tie_word_embeddings=False)
    config = run_config(base, chats, tmp_path / "run", data__added_tokens=["<|new|>"], training__max_steps=0)
    train(config, one_device())
    export(tmp_path / "run", tmp_path / "out", "merged")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name].shape == (385, 384)
        assert np.array_equal(after[name][:384], before[name])
        np.testing.assert_allclose(after[name][384], before[name].mean(axis=0), atol=1e-6)


def test_random_weights_to_a_model(base, tmp_path):
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": "river market bridge " * (1 + i % 4)} for i in range(24)])
    config = run_config(
        base, data, tmp_path / "run", lora=None, model__init="random", training__max_steps=20, data__max_length=64
    )
    last = train(config, one_device())
    assert last["loss"] < 4  # from ln 384 = 5.95
    export(tmp_path / "run", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(torch_logits(model), logits(run_model(tmp_path / "run"), IDS), atol=1e-4, rtol=0)


def test_export_never_writes_to_a_folder_with_files(lora_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    done = sft_jax("export", lora_run, tmp_path / "mine")
    assert done.returncode == 2
    assert "not an empty folder" in done.stderr
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]
    done = sft_jax("export", lora_run, tmp_path / "new", "--step", "5")
    assert done.returncode == 2
    assert "there are 8" in done.stderr
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="not a run directory"):
        export(tmp_path, tmp_path / "new")
