"""Loads the tokenizer of a model folder, with the chat template and tokens that a config adds."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_jax import builtin
from sft_jax.config.data import RESERVED_TEMPLATE_KWARGS
from sft_jax.errors import UserError
from sft_jax.files.foreign import reading
from sft_jax.files.json_object import read_bytes, read_object
from sft_jax.hf.tokenizer_checks import check_files, check_template, try_out


def load_tokenizer(
    folder: Path,
    chat_template: str | None = None,
    added_tokens: Sequence[str] = (),
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, int]:
    """Returns a fast tokenizer, since loss masks need offsets, and the number of added tokens; runs no remote code.

    Args:
        folder: a Hugging Face folder with ``tokenizer.json`` or the files to build it from.
        chat_template: path of a Jinja file that replaces the tokenizer's template.
        added_tokens: special tokens to add if the tokenizer lacks them.
        template_kwargs: defaults of template arguments, written into the templates, so that an exported tokenizer
            has them too.

    Raises:
        UserError: no tokenizer, no fast tokenizer, or no such template file.
    """
    from transformers import AutoTokenizer

    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder}: has only a SentencePiece tokenizer.model, whose conversion is not exact; "
            "add the tokenizer.json of the same model"
        )
    check_files(folder)
    unusable = f"{folder}: no usable tokenizer"
    with reading(unusable):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: only a slow tokenizer; add its tokenizer.json")
    with reading(f"{unusable}: it fails on a first text"):
        try_out(tokenizer)
    num_added = tokenizer.add_tokens([*added_tokens], special_tokens=True)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _template_of_processor(folder)
    if chat_template is not None:
        is_builtin = chat_template.startswith(builtin.PREFIX)
        path = builtin.locate(chat_template, "data.chat_template") if is_builtin else Path(chat_template).expanduser()
        if not os.path.isfile(path):  # unlike Path.is_file, also for names that are too long
            raise UserError(f"data.chat_template: no such file {chat_template}")
        try:
            tokenizer.chat_template = read_bytes(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"data.chat_template: {path} is not UTF-8: {error}") from error
    check_template(tokenizer.chat_template, folder)
    if template_kwargs:
        template = tokenizer.chat_template
        if isinstance(template, dict):
            tokenizer.chat_template = {name: _with_defaults(text, template_kwargs) for name, text in template.items()}
        elif template:
            tokenizer.chat_template = _with_defaults(template, template_kwargs)
        else:
            raise UserError("data.template_kwargs: the tokenizer has no chat template")
    return tokenizer, num_added


def has_template(folder: Path) -> bool:
    """Whether the files of a model have a chat template."""
    config = folder / "tokenizer_config.json"
    return (
        (folder / "chat_template.jinja").is_file()
        or (folder / "additional_chat_templates").is_dir()
        or (config.is_file() and bool(read_object(config).get("chat_template")))
        or _template_of_processor(folder) is not None
    )


def _template_of_processor(folder: Path) -> str | None:
    """Returns the chat template of a multimodal model whose tokenizer has none; older ones have it in these files."""
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file():
            template = read_object(folder / name).get("chat_template")
            if template:
                return template
    return None


def _with_defaults(template: str, kwargs: Mapping[str, Any]) -> str:
    """Adds default values for arguments to a template."""
    defaults = ""
    for name, value in kwargs.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or not re.search(rf"\b{name}\b", template):
            raise UserError(f"data.template_kwargs: the chat template reads no argument {name!r}")
        if name in RESERVED_TEMPLATE_KWARGS:
            raise UserError(f"data.template_kwargs: {name!r} is set by the renderer and cannot be overridden")
        defaults += f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
    return f"{defaults}{{{{ '' }}}}{template}"  # '' keeps a leading line break of the template


def _literal(value: Any) -> str:
    """Formats a value as a Jinja literal."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(name)}: {_literal(one)}' for name, one in value.items())}}}"
    return json.dumps(value)
