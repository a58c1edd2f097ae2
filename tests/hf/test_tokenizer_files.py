"""The tokenizer files of an export: byte copies of the base's files, plus changes that transformers 4 and 5 read."""

import json

import pytest
from kit import CHATML, CHATML_UNMARKED, make_model, one_device, run_config
from transformers import AutoTokenizer

from sft_jax.run.export import export
from sft_jax.run.train import train

TEXT = "<|im_start|>user\nriver bread<|im_end|>\n<think>so</think> ⟂"
_KEYS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


@pytest.fixture(params=["template in the config", "template in a file"])
def base(request, tmp_path):
    """A model with tokenizer files in the format of transformers 4."""
    folder = make_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    decoder = {
        str(i): {key: getattr(token, key) for key in _KEYS} for i, token in tokenizer.added_tokens_decoder.items()
    }
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    config = {"added_tokens_decoder": decoder, "additional_special_tokens": ["<|im_start|>"], **special}
    config |= {
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "chat_template.jinja").unlink()
    if request.param == "template in a file":
        (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    else:
        config["chat_template"] = CHATML
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    return folder


def exported(base, chats, tmp_path, form, **changes):
    run = tmp_path / "run"
    train(run_config(base, chats, run, training__max_steps=1, **changes), one_device())
    export(run, tmp_path / "out", form)
    return tmp_path / "out"


def test_unchanged_files_are_byte_copies(base, chats, tmp_path):
    out = exported(base, chats, tmp_path, "merged")
    export(tmp_path / "run", tmp_path / "adapter", "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (out / name).exists() == (base / name).exists()
        for folder in (out, tmp_path / "adapter"):
            assert not (base / name).exists() or (folder / name).read_bytes() == (base / name).read_bytes()
    assert (
        AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    )


def test_changes_are_in_every_file(base, chats, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text(CHATML_UNMARKED, encoding="utf-8")
    added = {"data__added_tokens": ["<think>", "</think>"], "data__chat_template": str(template)}
    out = exported(base, chats, tmp_path, "merged", **added)
    before, config = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (base, out))
    assert config.keys() - before.keys() <= {"chat_template"}  # no key that transformers 4 does not write
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|im_start|>", "<think>", "</think>"]
    assert config["chat_template"] == (out / "chat_template.jinja").read_text(encoding="utf-8") == CHATML_UNMARKED
    assert [token["content"] for token in config["added_tokens_decoder"].values()][-2:] == ["<think>", "</think>"]
    opened = AutoTokenizer.from_pretrained(out)
    assert len(opened) == len(AutoTokenizer.from_pretrained(base)) + 2
    ids = opened(TEXT)["input_ids"]
    assert ids.count(opened.convert_tokens_to_ids("<think>")) == 1
    assert opened.decode(ids) == TEXT
    assert opened.chat_template == CHATML_UNMARKED
    run = AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    assert run(TEXT)["input_ids"] == ids


def test_names_of_transformers_5_are_replaced(chats, tmp_path):
    """Transformers 4 can load the tokenizer of a base saved by transformers 5 with added tokens."""
    base = make_model(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "TokenizersBackend"
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"extra_special_tokens": ["<|im_start|>"]}))
    out = exported(base, chats, tmp_path, "merged", data__added_tokens=["<think>"])
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in config
    assert config["additional_special_tokens"] == ["<|im_start|>", "<think>"]
