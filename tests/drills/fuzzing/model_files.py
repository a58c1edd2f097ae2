"""Targets that read the files of a model or an adapter."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

from attempt import Targets

from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.chat.template_limits import enforce_limits
from sft_jax.data.read.rows import RowError
from sft_jax.hf.config import read_architecture, stop_ids
from sft_jax.hf.peft import read_adapter_config
from sft_jax.hf.reader import TensorReader
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.hf.tokenizer_checks import check_ids

_folder = tempfile.TemporaryDirectory(prefix="sft-jax-fuzz-")


def _written(target: str, name: str, data: bytes) -> Path:
    """Writes a file to the folder of a target."""
    folder = Path(_folder.name, target)
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return folder


def safetensors(data: bytes) -> None:
    """Reads all tensors of a file."""
    reader = TensorReader(_written("safetensors", "model.safetensors", data))
    for name in reader.names:
        reader.dtype(name)
        reader.read(name)
    reader.fingerprint()


def index(data: bytes) -> None:
    """Reads an index of shards that are not there, or one that is."""
    TensorReader(_written("index", "model.safetensors.index.json", data))


def config(data: bytes) -> None:
    """Reads an architecture, and the shapes and names that follow from it."""
    read_architecture(_written("config", "config.json", data))


def generation_config(data: bytes) -> None:
    """Reads the stop tokens."""
    stop_ids(_written("generation", "generation_config.json", data))


def tokenizer(data: bytes) -> None:
    """Loads a tokenizer, and tokenizes a text."""
    loaded, _ = load_tokenizer(_written("tokenizer", "tokenizer.json", data))
    check_ids(loaded, 10_000)


def tokenizer_config(data: bytes) -> None:
    """Loads a good tokenizer with other settings."""
    _written("tokenizer_config", "tokenizer.json", json.dumps(TOKENIZER).encode())
    load_tokenizer(_written("tokenizer_config", "tokenizer_config.json", data))


def chat_template(data: bytes) -> None:
    """Renders a conversation."""
    template = ChatTemplate(data.decode(errors="surrogateescape"), {"eos_token": "<e>"})
    messages: list[Any] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        with enforce_limits():
            template.render(messages, prompt=True)
            assert isinstance(template.reads, frozenset)
    except RowError:
        pass  # names the row, and ends in a user error unless rows are to be skipped


def adapter_config(data: bytes) -> None:
    """Reads the settings of an adapter."""
    read_adapter_config(_written("adapter", "adapter_config.json", data))


def _header(described: object, data: bytes = b"") -> bytes:
    text = json.dumps(described).encode()
    return struct.pack("<Q", len(text)) + text + data


def _json(*values: object) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


_SAFETENSORS = [
    _header({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}, bytes(16)),
    _header(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
            "b": {"dtype": "I64", "shape": [], "data_offsets": [4, 12]},
            "c": {"dtype": "BOOL", "shape": [0, 3], "data_offsets": [12, 12]},
        },
        bytes(12),
    ),
]
_LLAMA = {
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": [2],
}
_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_KINDS = (
    "qwen3",
    "gemma2",
    "mixtral",
    "qwen3_moe",
    "gpt2",
    "phi3",
    "gpt_oss",
    "falcon_h1",
    "qwen3_next",
    "deepseek_v3",
)
_PLAIN = {"id": 0, "content": "<e>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [_PLAIN | {"special": True}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel"},
    "model": {
        "type": "BPE",
        "unk_token": None,
        "vocab": {"<e>": 0, "H": 1, "e": 2, "l": 3, "o": 4, "ll": 5, "llo": 6},
        "merges": [["l", "l"], ["ll", "o"]],
    },
}
_UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<e>", 0.0], ["a", -1.0]], "byte_fallback": False}
_WORDS = {"type": "WordPiece", "unk_token": "<e>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
_TEMPLATES = [
    b"{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}",
    b"{% for m in messages if m.role != 'x' %}{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}",
    b"{% set ns = namespace(a=[], b='x') %}{% for i in range(9) %}{% set ns.b = ns.b * 2 ~ i %}{% endfor %}{{ ns.b }}",
    b"{% macro f(x) %}{{ x | tojson(indent=2) }}{% endmacro %}{{ f(messages) }}",
]
_ADAPTER = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "base_model_name_or_path": "a/b",
    "target_modules": ["q_proj"],
    "bias": "none",
    "use_dora": False,
    "init_lora_weights": True,
}

TARGETS: Targets = {
    "safetensors": (safetensors, _SAFETENSORS),
    "index": (index, _json({"metadata": {}, "weight_map": {"a": "model-1.safetensors"}})),
    "config": (config, _json(_LLAMA, {"model_type": "llama"}, *({"model_type": kind} | _SMALL for kind in _KINDS))),
    "generation_config": (generation_config, _json({"eos_token_id": [1, 2]}, {"eos_token_id": 2, "top_p": 0.5})),
    "tokenizer": (
        tokenizer,
        _json(
            TOKENIZER, TOKENIZER | {"model": _UNIGRAM}, TOKENIZER | {"model": _WORDS | {"vocab": {"<e>": 0, "H": 1}}}
        ),
    ),
    "tokenizer_config": (
        tokenizer_config,
        _json(
            {"eos_token": "<e>", "chat_template": "x"}, {"added_tokens_decoder": {"0": _PLAIN}, "model_max_length": 9}
        ),
    ),
    "chat_template": (chat_template, _TEMPLATES),
    "adapter_config": (adapter_config, _json(_ADAPTER, _ADAPTER | {"target_parameters": ["mlp.gate"]})),
}
