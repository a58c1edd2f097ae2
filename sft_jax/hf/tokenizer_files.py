"""Writes tokenizer and processor files that transformers 4 and 5 read: byte copies of the base's, plus any changes.

``save_pretrained`` of transformers 5 writes classes and keys that transformers 4 and libraries on top of it reject.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_jax.files.json_object import read_object
from sft_jax.hf.tokenizer import load_tokenizer

FILES = (  # of a tokenizer and of a processor
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
_MORE_TEMPLATES = "additional_chat_templates"
_PROCESSOR = "processor_config.json"
_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_ADDED = "additional_special_tokens"


def write_tokenizer(tokenizer: Any, base: Path, folder: Path) -> None:
    """Writes the tokenizer of a run to a folder without one, and the processor of a multimodal model.

    Args:
        tokenizer: the base's tokenizer, possibly with added tokens and another chat template.
        base: the folder of the base model.
    """
    original, _ = load_tokenizer(base)
    for name in FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    if (base / _MORE_TEMPLATES).is_dir():
        shutil.copytree(base / _MORE_TEMPLATES, folder / _MORE_TEMPLATES)
    known = original.added_tokens_decoder
    added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if i not in known}
    if added:
        (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
        names = [token.content for token in added.values()]
        _change(folder / _CONFIG, lambda config: _with_tokens(config, added, names))
        _change(folder / "added_tokens.json", lambda ids: ids | {token.content: i for i, token in added.items()})
        _change(folder / "special_tokens_map.json", lambda old: old | {_ADDED: [*old.get(_ADDED, []), *names]})
    if tokenizer.chat_template != original.chat_template:
        for stale in ("chat_template.json", _TEMPLATE):
            (folder / stale).unlink(missing_ok=True)
        shutil.rmtree(folder / _MORE_TEMPLATES, ignore_errors=True)
        template = tokenizer.chat_template
        if isinstance(template, str):
            (folder / _TEMPLATE).write_text(template, encoding="utf-8")
        else:
            template = [{"name": name, "template": text} for name, text in template.items()]
        _change(folder / _PROCESSOR, lambda config: {k: v for k, v in config.items() if k != "chat_template"})
        # Written to both files: transformers before 4.43 reads only tokenizer_config.json.
        _change(folder / _CONFIG, lambda config: config | {"chat_template": template})


def _with_tokens(config: dict[str, Any], added: Mapping[int, Any], names: list[str]) -> dict[str, Any]:
    if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name of the class
        config = config | {"tokenizer_class": "PreTrainedTokenizerFast"}
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    tokens = {str(i): {key: getattr(token, key) for key in keys} for i, token in added.items()}
    if isinstance(more := config.get("extra_special_tokens"), list):
        config = {key: value for key, value in config.items() if key != "extra_special_tokens"}
        names = [*more, *names]
    decoder = {**config.get("added_tokens_decoder", {}), **tokens}
    return config | {"added_tokens_decoder": decoder, _ADDED: [*config.get(_ADDED, []), *names]}


def _change(path: Path, change: Any) -> None:
    """Applies ``change`` to the JSON object in a file, if the file exists."""
    if path.is_file():
        old = read_object(path)
        path.write_text(json.dumps(change(old), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
