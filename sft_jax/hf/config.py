"""Reads ``config.json`` into an :class:`Architecture`; raises on settings that are not supported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft_jax.errors import UserError
from sft_jax.hf.block_formats import BlockFormat, block_format
from sft_jax.models.architecture import Architecture
from sft_jax.models.families import check_family, read_family


def read_config(folder: Path) -> dict[str, Any]:
    """Reads ``config.json`` without changes.

    Raises:
        UserError: missing or not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object")
    return config


def with_vocab_size(config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Returns ``config.json`` with another vocabulary size, which a multimodal model has in ``text_config``."""
    if isinstance(text := config.get("text_config"), dict):
        return config | {"text_config": text | {"vocab_size": vocab_size}}
    return config | {"vocab_size": vocab_size}


def read_format(folder: Path) -> BlockFormat | None:
    """Returns the format of a model's quantized weights; None if they are not quantized.

    Raises:
        UserError: a quantization that cannot be read.
    """
    config = read_config(folder)
    try:
        return block_format(config)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error


def read_architecture(folder: Path) -> Architecture:
    """Reads the architecture of a Hugging Face model folder, with transformers' defaults for missing keys.

    Raises:
        UserError: a family, activation, rotary embedding or quantization that is not supported.
    """
    path = folder / "config.json"
    raw = read_config(folder)
    try:
        check_family(raw.get("model_type"))
        block_format(raw)
        return read_family(_transformers_config(folder))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _transformers_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from error


def file_dtype(folder: Path) -> str:
    """Reads the dtype of a model's files if it is float32, otherwise bfloat16: the range of float16 is too small."""
    config = read_config(folder)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return "float32" if dtype == "float32" else "bfloat16"


def stop_ids(folder: Path) -> list[int]:
    """Reads the stop token ids (``eos_token_id``) of ``generation_config.json`` or ``config.json``; may be empty."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            if ids is not None:
                return ids if isinstance(ids, list) else [ids]
    return []
