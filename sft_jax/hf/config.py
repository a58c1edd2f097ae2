"""``config.json`` to :class:`Architecture`: what is supported is read, anything else is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sft_jax.architecture import Architecture, Rope
from sft_jax.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


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
        UserError: a model family, activation, rope type or quantisation that is not supported.
    """
    path = folder / "config.json"
    raw = read_config(folder)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{path}: model family {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise UserError(
            f"{path}: quantised weights ({method or 'of an unknown method'}) are not read; give the model that they "
            "were made of: model.quantization: nf4 or int8 quantises it here, and an adapter of the quantised one "
            "opens on it with --base"
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    activation = getattr(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UserError(f"{path}: hidden_act {activation!r} is not supported; supported is silu")
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    if num_heads % num_kv_heads:
        raise UserError(f"{path}: num_key_value_heads {num_kv_heads} does not divide {num_heads} heads")
    attention_bias = bool(getattr(config, "attention_bias", False))
    return Architecture(
        family=family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        norm_eps=config.rms_norm_eps,
        rope=_rope(config.rope_parameters, config.max_position_embeddings, path),
        tie_word_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=family in ("llama", "qwen3") and attention_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=family == "qwen3",
        sliding_windows=_sliding_windows(config),
        max_positions=config.max_position_embeddings,
        initializer_range=getattr(config, "initializer_range", 0.02),
    )


def stop_ids(folder: Path) -> list[int]:
    """The eos ids of ``generation_config.json``, else of ``config.json``; empty where neither has one."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            if ids is not None:
                return ids if isinstance(ids, list) else [ids]
    return []


def _rope(parameters: dict[str, Any], max_positions: int, path: Path) -> Rope:
    kind = parameters.get("rope_type", "default")
    theta = float(parameters["rope_theta"])
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{path}: partial_rotary_factor {parameters['partial_rotary_factor']} is not supported")
    if kind in ("default", "dynamic"):  # a dynamic one is the default within the context, and no row is longer
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, factor=float(parameters["factor"]))
    if kind == "llama3":
        return Rope(
            theta,
            kind,
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
        )
    if kind == "yarn":
        factor = float(parameters["factor"])
        return Rope(
            theta,
            kind,
            factor=factor,
            original_max_position_embeddings=int(parameters.get("original_max_position_embeddings") or max_positions),
            beta_fast=float(parameters.get("beta_fast") or 32.0),
            beta_slow=float(parameters.get("beta_slow") or 1.0),
            truncate=bool(parameters.get("truncate", True)),
            attention_factor=_attention_factor(parameters, factor),
        )
    supported = "default, linear, llama3, yarn, dynamic"
    raise UserError(f"{path}: rope_type {kind!r} is not supported; supported are {supported}")


def _attention_factor(parameters: dict[str, Any], factor: float) -> float:
    """By how much YaRN scales queries and keys, where it is not told: ``0.1 · ln(factor) + 1``."""
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    of_all, mscale = parameters.get("mscale_all_dim"), parameters.get("mscale")
    return scale(mscale) / scale(of_all) if mscale and of_all else scale(1.0)


def _sliding_windows(config: Any) -> tuple[int | None, ...] | None:
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else None
