"""The text decoder of a multimodal model is trained; everything else is exported as it is."""

import json
import logging

import numpy as np
import pytest
import torch
import transformers
from families import SHAPE
from kit import CHATML, logits, make_tokenizer, one_device, run_config, run_model
from peft import PeftModel
from rows.multimodal import WHOLE
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForImageTextToText

from sft_jax.assembly import open_base, open_model
from sft_jax.errors import UserError
from sft_jax.hf.config import file_dtype, stop_ids
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.run.export import export
from sft_jax.run.train import train

IDS = np.random.default_rng(0).integers(0, 380, (2, 40))
WEIGHTS = "model.safetensors"
PROCESSOR = {
    "preprocessor_config.json": {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 28}},
    "processor_config.json": {"processor_class": "PixtralProcessor", "image_token": "[IMG]"},
    "video_preprocessor_config.json": {"fps": 2},
}
TEXT = SHAPE | {"model_type": "mistral", "vocab_size": 400, "head_dim": 8, "num_hidden_layers": 2, "eos_token_id": 2}


def make_base(folder, **changes):
    """A Mistral 3 of random weights, whose files have the names of older versions of transformers."""
    settings = WHOLE["mistral3"] | {"image_token_index": 399} | changes
    config = transformers.AutoConfig.for_model("mistral3", text_config=TEXT, **settings)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    make_tokenizer().save_pretrained(folder)
    for name, content in PROCESSOR.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def renamed(folder, *pairs):
    """The tensors of a folder under other names."""
    tensors = {}
    for name, x in load_file(folder / WEIGHTS).items():
        for old, new in pairs:
            name = new + name.removeprefix(old) if name.startswith(old) else name
        tensors[name] = x
    save_file(tensors, folder / WEIGHTS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("whole") / "base")


def loaded(folder):
    """The model as transformers loads it, which must find each tensor that it wants, and want each that it finds."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def torch_logits(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def same_bytes(before, after):
    return before.dtype == after.dtype and before.tobytes() == after.tobytes()


def test_full_at_rate_0_is_the_base(base, chats, tmp_path, capsys):
    """Also a buffer of integers, and tensors that the configs do not explain."""
    tensors = load_file(base / WEIGHTS) | {"vision_tower.position_ids": np.arange(5)}
    (tmp_path / "base").mkdir()
    for path in base.iterdir():
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    save_file(tensors, tmp_path / "base" / WEIGHTS)
    config = run_config(tmp_path / "base", chats, tmp_path / "run", lora=None, optimizer__learning_rate=0.0)
    train(config, one_device())
    num_outside = sum(not name.startswith("language_model.") for name in tensors)
    kept = f"vision_tower, multi_modal_projector: {num_outside} tensors are not trained and are exported as they are"
    assert kept in capsys.readouterr().err
    export(tmp_path / "run", tmp_path / "out")
    after = load_file(tmp_path / "out" / WEIGHTS)
    assert after.keys() == tensors.keys()
    assert all(same_bytes(tensors[name], after[name]) for name in tensors)
    for name in ("config.json", *PROCESSOR):
        before, after = (json.loads((tmp_path / side / name).read_text()) for side in ("base", "out"))
        assert before == after


def test_adapter_and_merged_in_transformers(base, chats, tmp_path, caplog):
    train(run_config(base, chats, tmp_path / "run", training__max_steps=4), one_device())
    export(tmp_path / "run", tmp_path / "adapter")
    export(tmp_path / "run", tmp_path / "merged", "merged")
    ours, whole = logits(run_model(tmp_path / "run"), IDS), loaded(base)
    assert np.abs(ours - torch_logits(whole)).max() > 0.1
    np.testing.assert_allclose(torch_logits(loaded(tmp_path / "merged")), ours, atol=1e-4, rtol=0)
    opened = open_model(str(tmp_path / "adapter"), devices=one_device())
    np.testing.assert_allclose(logits(opened.network(), IDS), ours, atol=1e-5)

    with caplog.at_level(logging.WARNING):
        adapted = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    assert "missing" not in caplog.text
    np.testing.assert_allclose(torch_logits(adapted), ours, atol=1e-4, rtol=0)
    names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)

    before, after = (load_file(folder / WEIGHTS) for folder in (base, tmp_path / "merged"))
    changed = {name for name in before if not same_bytes(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {name for name in before if "language_model" in name and "proj" in name}
    for folder in ("adapter", "merged"):
        assert all((tmp_path / folder / name).read_bytes() == (base / name).read_bytes() for name in PROCESSOR)
        assert json.loads((tmp_path / folder / "generation_config.json").read_text())["eos_token_id"] == 2
        assert "AutoModelForImageTextToText" in (tmp_path / folder / "README.md").read_text()


def test_added_tokens(base, chats, tmp_path):
    """They change the size in ``text_config``; the embeddings beyond the tokenizer are used first."""
    template = tmp_path / "template.jinja"
    template.write_text(CHATML.replace("<|im_end|>", "<|done0|>"))
    tokens = [f"<|done{i}|>" for i in range(15)]
    more = {"data__chat_template": str(template), "training__max_steps": 4}
    for num_tokens, size in ((15, 400), (20, 404)):
        run, out, adapter = (tmp_path / f"{name}{size}" for name in ("run", "merged", "adapter"))
        whole = base if num_tokens == 15 else make_base(tmp_path / "other", image_token_index=500)
        added = [*tokens, *(f"<|more{i}|>" for i in range(num_tokens - 15))]
        train(run_config(whole, chats, run, data__added_tokens=added, **more), one_device())
        export(run, out, "merged")
        export(run, adapter)
        ours, model = logits(run_model(run), IDS), loaded(out)
        assert model.config.text_config.vocab_size == size == ours.shape[-1]
        np.testing.assert_allclose(torch_logits(model), ours, atol=1e-4, rtol=0)
        model = loaded(whole)
        model.resize_token_embeddings(size)
        adapted = PeftModel.from_pretrained(model, adapter).eval()
        np.testing.assert_allclose(torch_logits(adapted), ours, atol=1e-4, rtol=0)
    config = run_config(base, chats, tmp_path / "bad", data__added_tokens=[f"<|{i}|>" for i in range(16)])
    with pytest.raises(UserError, match=r"data.added_tokens: '<\|15\|>' is the token of image_token_index"):
        train(config, one_device())


@pytest.mark.parametrize(
    "pairs",
    [
        (("language_model.lm_head", "lm_head"),),
        (("language_model.lm_head", "lm_head"), ("language_model.model.", "language_model.")),
        (
            ("language_model.lm_head", "lm_head"),
            ("language_model.model.", "model.language_model."),
            ("vision_tower", "model.vision_tower"),
            ("multi_modal_projector", "model.multi_modal_projector"),
        ),
    ],
)
def test_other_layouts(base, tmp_path, pairs):
    expected = logits(open_model(str(base), devices=one_device()).network(), IDS)
    make_base(tmp_path / "base")
    renamed(tmp_path / "base", *pairs)
    np.testing.assert_array_equal(torch_logits(loaded(tmp_path / "base")), torch_logits(loaded(base)))
    ours = logits(open_model(str(tmp_path / "base"), devices=one_device()).network(), IDS)
    np.testing.assert_array_equal(ours, expected)


def test_what_only_text_config_says(base, tmp_path):
    assert stop_ids(base) == [2]
    assert file_dtype({"text_config": {"dtype": "bfloat16"}}) == "bfloat16"
    assert file_dtype({"dtype": "float16", "text_config": {"dtype": "bfloat16"}}) == "float16"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    tokenizer = make_tokenizer()
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(tmp_path)
    tokenizer.chat_template = template
    assert load_tokenizer(tmp_path)[0].chat_template == "{{ messages }}"


def test_what_is_refused(base, tmp_path):
    with pytest.raises(UserError, match=r"model.init: random makes only the decoder of mistral3"):
        open_base(str(base), init="random")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["model_type"] = "qwen2"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="'qwen2' is not supported in mistral3; supported: mistral, ministral3"):
        open_base(str(tmp_path), init="random")
