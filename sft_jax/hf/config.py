"""Reads ``config.json`` into an :class:`Architecture`; raises on settings that are not supported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft_jax.errors import UserError
from sft_jax.files.foreign import reading, reason
from sft_jax.files.json_object import read_object
from sft_jax.hf.block_formats import BlockFormat, block_format
from sft_jax.hf.config_values import LARGEST_SIZE, check_values
from sft_jax.models.architecture import Architecture
from sft_jax.models.families import check_family, read_family

# What a family raises on values of a wrong kind, which are too many to check one by one.
_WRONG_VALUE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
MOST_STOP_IDS = 1_000
_OF_TEXT = ("bos_", "eos_", "pad_", "sep_", "decoder_start_")  # tokens that a text may have


def read_config(folder: Path) -> dict[str, Any]:
    """Reads ``config.json`` without changes.

    Raises:
        UserError: missing or not a JSON object.
    """
    return read_object(folder / "config.json")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of the decoder: a multimodal model has them in ``text_config``, some of them in both."""
    text = config.get("text_config")
    return config | text if isinstance(text, dict) else config


def file_dtype(config: dict[str, Any]) -> str:
    """Returns the dtype that ``config.json`` names for the weights, by default float32."""
    both = (config, text_config(config))
    return next((dtype for one in both for key in ("dtype", "torch_dtype") if (dtype := one.get(key))), "float32")


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns ``config.json`` that names another dtype of the weights, everywhere where it names one."""
    changed = {
        key: with_dtype(value, dtype) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
    }
    return changed | {key: dtype for key in ("dtype", "torch_dtype") if key in config}


def with_vocab_size(config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Returns ``config.json`` with another vocabulary size, which a multimodal model has in ``text_config``."""
    if not isinstance(text := config.get("text_config"), dict):
        return config | {"vocab_size": vocab_size}
    stale = {"vocab_size": vocab_size} if "vocab_size" in config else {}  # a second one that nothing may read
    return config | stale | {"text_config": text | {"vocab_size": vocab_size}}


def with_tie(config: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Returns ``config.json`` that says whether ``lm_head`` is tied, also in ``text_config`` if that says it too."""
    key, text = "tie_word_embeddings", config.get("text_config")
    if isinstance(text, dict) and key in text:
        config = config | {"text_config": text | {key: tied}}
    return config | {key: tied}


def media_tokens(config: dict[str, Any]) -> dict[int, str]:
    """Returns the token ids in ``config.json`` that stand for images, video or audio, and the key of each."""
    keys = [key for key in config if key.endswith(("_token_id", "_token_index")) and not key.startswith(_OF_TEXT)]
    return {config[key]: key for key in keys if isinstance(config[key], int)} if "text_config" in config else {}


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
        check_values(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    from transformers import AutoConfig

    with reading(str(path)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    try:
        return read_family(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except _WRONG_VALUE as error:
        raise UserError(
            f"{path}: cannot be read as a {raw['model_type']}: {reason(error)}; compare it with that of the original"
        ) from error


def compute_dtype(folder: Path) -> str:
    """Returns float32 if a model's files are, otherwise bfloat16: the range of float16 is too small."""
    return "float32" if file_dtype(read_config(folder)) == "float32" else "bfloat16"


def stop_ids(folder: Path) -> list[int]:
    """Reads the stop token ids (``eos_token_id``) of ``generation_config.json`` or ``config.json``; may be empty.

    A multimodal model may have them in ``text_config``, which counts where no other place has them.

    Raises:
        UserError: a file is not a JSON object, or has something else than ids there.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            config = read_object(path)
            for one in (config, text_config(config)):
                if (ids := one.get("eos_token_id")) is not None:
                    return _ids(ids, path)
    return []


def _ids(value: Any, path: Path) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    if len(ids) > MOST_STOP_IDS or not all(type(one) is int and 0 <= one <= LARGEST_SIZE for one in ids):
        raise UserError(
            f"{path}: eos_token_id {str(value)[:60]} is neither a token id nor a list of at most {MOST_STOP_IDS}; set "
            "the id of the token that ends an answer"
        )
    return ids
