"""``config.json`` to :class:`Architecture`: what is supported is read, anything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft_jax.errors import UserError
from sft_jax.models.architecture import Architecture
from sft_jax.models.families import check_family, read_family


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as it is written.

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


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a Hugging Face model folder, with transformers' defaults for keys that are absent.

    Raises:
        UserError: a family, activation, rotary embedding or quantisation that is not supported.
    """
    path = folder / "config.json"
    raw = read_config(folder)
    try:
        check_family(raw.get("model_type"))
        return read_family(_of_transformers(folder, raw))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _of_transformers(folder: Path, raw: dict[str, Any]) -> Any:
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise UserError(
            f"quantised weights ({method or 'of an unknown method'}) are not read; give the model that they "
            "were made of: model.quantization: nf4 or int8 quantises it here, and an adapter of the quantised one "
            "opens on it with --base"
        )
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from error


def stop_ids(folder: Path) -> list[int]:
    """The eos ids of ``generation_config.json``, else of ``config.json``; empty where neither has one."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            if ids is not None:
                return ids if isinstance(ids, list) else [ids]
    return []
